"""`altgrad export`: what a run has learnt, as a file that runs where there is only PyTorch."""

from pathlib import Path

import click

from altgrad.cli_frame import Command, emit, note
from altgrad.cli_options import FOLDER
from altgrad.cli_progress import Display
from altgrad.errors import UsageError


@click.command(cls=Command)
@click.argument("folder", metavar="RUN", type=FOLDER)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The file. [default: model.pt2 in RUN, or model.safetensors with --packed]")
@click.option("--readout", help="Another read-out than the engine's own, for rules that have several: own, last, sum, vote, a block's name …")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="The only number of examples that it shall take. [default: any]")
@click.option("--packed", is_flag=True, help="A quantised model's weights as codes of a few bits, for altgrad.quantisation.load_packed.")
@click.option("--fallback", is_flag=True, help="If the newest checkpoint is damaged, take the newest good one before it.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON value on one line.")
def export(folder: Path, out: Path | None, readout: str | None, batch: int | None, packed: bool, fallback: bool, overwrite: bool, as_json: bool) -> None:
    """Write the trained model of a run to a file for torch.export.load.

    RUN is its folder, which stays as it is. The file holds the read-out with its heads and needs PyTorch alone:

    \b
    altgrad export runs/a --out a.pt2
    python -c "import torch; model = torch.export.load('a.pt2').module()"

    With --packed it is the model's state instead, quantised weights at their few bits a number.
    """
    if packed and (readout is not None or batch is not None):
        raise UsageError("--packed writes the model's weights, so --readout and --batch have nothing to act on; leave them out.")
    path = out or folder / ("model.safetensors" if packed else "model.pt2")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} is there already. Give another --out, or --overwrite to replace it.")
    if not path.parent.is_dir():
        raise UsageError(f"the folder of --out {path} does not exist; make it first.")
    with Display(quiet=False) as display:
        display.show("exporting", 0, 1, figures=str(folder))
        from altgrad import durable, export, training

        opened = training.opened(folder, fallback=fallback)
        engine = export.reading(opened.engine, readout)
        if packed:
            from altgrad.quantisation import pack

            content = pack(export.whole(opened.problem, engine.bake(opened.problem, opened.params, opened.state))).content()
        else:
            module = engine.export(opened.problem, opened.params, opened.state)
            content = export.captured(module, opened.problem.example(), batch=batch)
        with durable.explained(path):
            durable.replace(path, content)
    read = readout or getattr(engine, "readout", "own")
    if packed:
        read = "the model's state, packed"
    if as_json:
        emit({"file": str(path), "bytes": len(content), "step": opened.step, "engine": opened.settings.engine, "readout": read})
    elif packed:
        click.echo(f"{path}: {len(content):,} bytes, the model's weights at step {opened.step}")
        note(f"altgrad.quantisation.load_packed({str(path)!r}, model)")
    else:
        click.echo(f"{path}: {len(content):,} bytes, the model at step {opened.step} (read-out {read}), for {batch or 'any number of'} examples")
        note(f"torch.export.load({str(path)!r}).module()")


COMMANDS = (export,)
