"""`python -m jaxrm` is the `jaxrm` command."""

from jaxrm.cli import main

if __name__ == '__main__':
    main()
