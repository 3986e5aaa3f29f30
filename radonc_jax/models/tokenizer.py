"""The tokenizer of a Hugging Face folder, with exactly the ids its files say.

`tokenizer.json` is taken as it stands. A folder that holds sentencepiece's `tokenizer.model` alone
is converted here, because transformers 5 rebuilds such a tokenizer by the class it guesses and then
gives other ids than sentencepiece (for Mistral without the leading space, for both families on
text that begins with a space).

Special tokens are known by id only: one that is spelt out in a text is read as plain characters.
"""

import json
import os
from pathlib import Path

# Set before transformers is imported: its notice that PyTorch is absent is no news here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
SETTINGS, ADDED = "tokenizer_config.json", "added_tokens.json"
SPACE = "\u2581"  # sentencepiece's mark for a space
BPE = 2  # of sentencepiece's TrainerSpec.ModelType


def load_tokenizer(folder: Path):
    """The folder's tokenizer, a transformers fast tokenizer.

    Raises:
      FileNotFoundError: neither `tokenizer.json` nor `tokenizer.model`.
      ValueError: a damaged file, no BOS or EOS token, or a sentencepiece model that cannot be
        converted exactly.
    """
    folder = Path(folder)
    if (folder / JSON).is_file():
        tokenizer = _from_json(folder)
    elif (folder / SENTENCEPIECE).is_file():
        tokenizer = _from_sentencepiece(folder)
    else:
        raise FileNotFoundError(
            f"{folder} holds neither {JSON} nor {SENTENCEPIECE}: copy the tokenizer's files there"
        )
    # Text is text: a "</s>" typed into a record must not become an end of sequence.
    tokenizer.split_special_tokens = True
    for kind in ("bos", "eos"):
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise ValueError(
                f"the tokenizer in {folder} has no {kind.upper()} token: name it as "
                f'"{kind}_token" in {SETTINGS}'
            )
    return tokenizer


def _from_json(folder: Path):
    # Not AutoTokenizer: for LLaMA it keeps only vocabulary and merges of the file and replaces
    # its normaliser by another one.
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{folder / JSON} cannot be read: {error}") from None


def _from_sentencepiece(folder: Path):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    path = folder / SENTENCEPIECE
    spec, pieces = _read_sentencepiece(path)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    reserved = {pieces[number] for number in spec["special"] + spec["user_defined"]}
    mergeable = {piece: n for piece, n in vocabulary.items() if piece not in reserved}
    merges = [pair for piece in mergeable for pair in _splits(piece, mergeable)]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            unk_token=pieces[spec["unk"]],
            fuse_unk=True,
            byte_fallback=spec["byte_fallback"],
        )
    )
    steps = []
    if spec["strip"]:
        steps = [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" +"), " "),
        ]
    if spec["dummy_prefix"]:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec["dummy_prefix"]:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    tokenizer.add_special_tokens(
        [AddedToken(pieces[number], normalized=False) for number in spec["special"]]
    )
    tokenizer.add_tokens([AddedToken(pieces[n], normalized=False) for n in spec["user_defined"]])
    for token, number in sorted(_read_json(folder / ADDED).items(), key=lambda item: item[1]):
        tokenizer.add_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != number:
            raise ValueError(
                f"{folder / ADDED} gives {token!r} the id {number}, but the next free id is "
                f"{tokenizer.token_to_id(token)}"
            )
    settings = _read_json(folder / SETTINGS)
    named = {"unk_token": pieces[spec["unk"]]}
    for kind in ("bos", "eos", "pad"):
        if spec[kind] >= 0:
            named[f"{kind}_token"] = pieces[spec[kind]]
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(key)
        value = value["content"] if isinstance(value, dict) else value
        if value is None:
            continue
        if tokenizer.token_to_id(value) is None:
            raise ValueError(f"{folder / SETTINGS}: {key} {value!r} is not a token of {path}")
        named[key] = value
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named
    )


def _read_sentencepiece(path: Path) -> tuple[dict, list[str]]:
    """(what matters of the model's settings, its pieces by id)."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is not a sentencepiece model, or cut short: {error}") from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if not model.pieces:
        raise ValueError(f"{path} is not a sentencepiece model: it has no pieces")
    refused = {
        "a model type other than BPE": trainer.model_type != BPE,
        "character normalisation": bool(normalizer.precompiled_charsmap),
        "spaces after words": trainer.treat_whitespace_as_suffix,
    }
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    symbols = [n for n, piece in enumerate(model.pieces) if piece.type == kinds.USER_DEFINED]
    # The text after such a symbol would get a space that sentencepiece does not put there.
    refused["user-defined symbols with a leading space"] = symbols and normalizer.add_dummy_prefix
    found = [name for name, there in refused.items() if there]
    if found:
        raise ValueError(
            f"{path} asks for {found}, which is not supported: supply {JSON} beside it"
        )
    special = (kinds.CONTROL, kinds.UNKNOWN)
    pieces = [piece.piece for piece in model.pieces]
    # The ids of the settings are those of training; a piece that is not there has no id.
    numbers = {piece: number for number, piece in enumerate(pieces)}
    spec = {
        "unk": next(n for n, p in enumerate(model.pieces) if p.type == kinds.UNKNOWN),
        "bos": numbers.get(trainer.bos_piece or "<s>", -1),
        "eos": numbers.get(trainer.eos_piece or "</s>", -1),
        "pad": numbers.get(trainer.pad_piece or "<pad>", -1),
        "byte_fallback": trainer.byte_fallback,
        "strip": normalizer.remove_extra_whitespaces,
        "dummy_prefix": normalizer.add_dummy_prefix,
        "special": [n for n, p in enumerate(model.pieces) if p.type in special],
        "user_defined": symbols,
    }
    return spec, pieces


def _splits(piece: str, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All merges that make a piece; pieces come in the order of their merges' priority."""
    pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    known = [(a, b) for a, b in pairs if a in vocabulary and b in vocabulary]
    return sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
