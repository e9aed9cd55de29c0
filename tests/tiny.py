"""A tiny byte-level BPE tokenizer with a Llama-3-like chat template, made in memory for tests."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = '<|begin_of_text|>', '<|eot_id|>', '<|pad|>'
SPECIALS = (BOS, EOS, PAD, '<|start_header_id|>', '<|end_header_id|>', '<|end_of_text|>')

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] "
    "+ '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    '{% endif %}'
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama-3's words; GPT-2's would split two line breaks before a word, across the prompt's end.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)

TEXT = (
    'the quick brown fox jumps over the lazy dog and asks the user what the assistant would say',
    'What is the answer? The answer is that there is no answer, only better and worse answers.',
    'system user assistant tool: hello world, is this the token that closes the last user turn?',
    'one two three four five six seven eight nine ten; good bad better best worse worst\n\n',
)


def tokenizer(
    *,
    vocab: int = 384,
    template: str | None = LLAMA3,
    specials: tuple[str, ...] = SPECIALS,
    bos: str | None = BOS,
    eos: str | None = EOS,
    pad: str = PAD,
    adds_bos: bool = False,
    words: str | None = WORDS,
) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab` ids.

    With `adds_bos` its post-processor puts BOS in front; without `words` it splits like GPT-2.
    """
    backend = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [] if words is None else [pre_tokenizers.Split(Regex(words), 'isolated')]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, by_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    if adds_bos:
        ids = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(f'{bos} $A', None, ids)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad
    )
    made.chat_template = template
    return made


def save(folder: str | Path, **options) -> PreTrainedTokenizerFast:
    """`tokenizer(**options)`, also written to the folder as from_pretrained reads it."""
    made = tokenizer(**options)
    made.save_pretrained(folder)
    return made
