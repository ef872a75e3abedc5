"""InternLM2's tokenizer from the files of its repository, which has it as a sentencepiece model and code of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _USER_DEFINED = 1, 4  # kinds of pieces of a sentencepiece model


def read_tokenizer(base: str, revision: str | None) -> Tokenizer:
    """The tokenizer of ``tokenizer.model`` with the marks of ``tokenizer_config.json``; no mark is put in front.

    Sentencepiece joins the pair whose whole has the lowest id, the leftmost first; so does this. Where two pairs
    overlap that join to the same piece, it may take another than sentencepiece, as transformers' own conversions do.

    Args:
        base: a local folder or hub id.
        revision: of the hub repository.

    Raises:
        ValueError: the files lack something, or are of another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    proto = _read_pieces(_file(base, "tokenizer.model", revision))
    rule = proto.normalizer_spec
    if proto.trainer_spec.model_type != 2 or rule.precompiled_charsmap or rule.remove_extra_whitespaces:
        raise ValueError(
            f"tokenizer.model of {base} does not join pairs of characters as they are: it is no InternLM2's."
        )
    pieces = [piece.piece for piece in proto.pieces]
    merges = _merges({piece: index for index, piece in enumerate(pieces) if proto.pieces[index].type == _NORMAL})
    own = [piece for index, piece in enumerate(pieces) if proto.pieces[index].type == _USER_DEFINED]
    settings = json.loads(_file(base, "tokenizer_config.json", revision).read_text(encoding="utf-8"))
    marks = {int(index): AddedToken(**mark) for index, mark in settings.get("added_tokens_decoder", {}).items()}
    for index in marks:
        if index < len(pieces):
            pieces[index] = marks[index].content  # of places that were kept free
    how = {"unk_token": pieces[proto.trainer_spec.unk_id], "fuse_unk": True, "byte_fallback": True}
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **how))
    spaces = [normalizers.Prepend("▁")] * rule.add_dummy_prefix + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece in own if piece in vocabulary])
    tokenizer.add_special_tokens([marks[index] for index in sorted(marks)])
    for index, mark in marks.items():
        if tokenizer.token_to_id(mark.content) != index:
            raise ValueError(f"tokenizer_config.json of {base} gives {mark.content} the id {index}, which is not free.")
    return tokenizer


def _read_pieces(path: Path) -> Any:
    """The message of a sentencepiece model, by the description of it that transformers has."""
    from transformers.convert_slow_tokenizer import import_protobuf

    library: Any = import_protobuf()
    proto = library.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def _merges(pieces: dict[str, int]) -> list[tuple[str, str]]:
    """Every two pieces that make up a third, in the order of its id."""
    found = []
    for whole in sorted(pieces, key=pieces.__getitem__):
        halves = ((whole[:cut], whole[cut:]) for cut in range(1, len(whole)))
        known = [pair for pair in halves if pair[0] in pieces and pair[1] in pieces]
        found += sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
    return found


def _file(base: str, name: str, revision: str | None) -> Path:
    from transformers.utils.hub import cached_file

    found = cached_file(base, name, revision=revision)
    if found is None:
        raise ValueError(f"{base} has no {name}: it is not the InternVL2 that the checkpoint was tuned from.")
    return Path(found)
