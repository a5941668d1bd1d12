"""Command `vq-import`: an image tokenizer of another project → one of ours. None of that project's code is needed.

    vq-import source=llamagen path=vq_ds16_c2i.pt out=runs/llamagen
    vq-import source=emu3 path=DIR_OF_THE_WHOLE_MODEL out=runs/emu3

Leaves in `out`: tokenizer/ (loadable with ImageTokenizer.from_pretrained; `vq-encode`, `vq-evaluate` and `lm-train`
take it) and the resolved config.yaml. Nothing in the files is run or unpickled, and nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqlm.command import command

# torch and what stands on it: seconds, which `--help` and a mistyped key do not wait for. Functions import them.
if TYPE_CHECKING:
    import vq.importers
    import vq.importers.source


def import_(
    source: vq.importers.SourceName,
    path: str,
    out: str,
    image_size: int | None,
    lookup: vq.importers.source.Lookup | None,
    prefix: str | None,
) -> None:
    """Read the files, build the tokenizer, save it, say what was found."""
    from vq.importers import import_tokenizer

    imported = import_tokenizer(source, path, image_size, lookup, prefix)
    folder = Path(out) / "tokenizer"
    imported.tokenizer.save_pretrained(folder)
    print(summary(imported))
    print(f"tokenizer: {folder}")


def summary(imported: vq.importers.Imported) -> str:
    """What a person checks before trusting the codes."""
    tokenizer, source = imported.tokenizer, imported.source
    parameters = sum(each.numel() for each in tokenizer.parameters())
    grid = tokenizer.image_size // tokenizer.downsample
    lines = [
        f"source: {source.title}, from {imported.origin}"
        + (f" under {imported.prefix}*" if imported.prefix else ""),
        *(
            f"{name}: {architecture(getattr(tokenizer, name))}"
            for name in ("encoder", "quantizer", "decoder")
        ),
        f"parameters: {parameters / 1e6:.1f} M",
        f"codes: K = {tokenizer.codebook_size}, Q = {tokenizer.depth}, D = {tokenizer.quantizer.dim}, "
        f"f = {tokenizer.downsample}: {tokenizer.image_size}x{tokenizer.image_size} px → {grid}x{grid} codes",
        f"pixels: the original takes {source.pixels}",
        f"parity: {source.parity}",
        *(f"left out: {count} tensors: {why}" for why, count in imported.left_out.items()),
        *(f"note: {note}" for note in imported.notes),
    ]
    return "\n".join(lines)


def architecture(part: Any) -> str:
    """Class and arguments, as they are saved."""
    from vqlm.checkpoint import describe

    described = describe(part)
    name = described.pop("type")
    return f"{name}({', '.join(f'{key}={value}' for key, value in described.items())})"


main = command("vq_import", import_)

if __name__ == "__main__":
    main()
