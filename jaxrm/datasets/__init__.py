"""Data sets, one file each: `load(split) -> list[Preference]`."""
