"""The command: arguments, progress bars, files, the table on the terminal."""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from hfkv.calibrate.coding import SIDES
from hfkv.calibrate.options import KEY_BITS
from hfkv.calibrate.prompts import from_files, generated
from hfkv.calibrate.recording import Prompt
from hfkv.calibrate.result import Calibration, Target
from hfkv.calibrate.search import calibrate
from hfkv.config import LeanKVConfig
from hfkv.demo import smollm2
from hfkv.packing import Packed
from hfkv.report import tier_name
from hfkv.version import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hfkv calibrate`."""
    parser.add_argument(
        "--model", default="smollm2", help="name or path for from_pretrained (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument(
        "--ratio", type=float, help="target: physical bytes per exact byte, at most, everything counted"
    )
    parser.add_argument("--bytes-per-token", type=float, help="target: physical bytes per token of all layers, at most")
    parser.add_argument(
        "--kl", type=float, help="target: KL from the exact cache in nats, at most, as few bytes as can be"
    )
    parser.add_argument(
        "--prompts", nargs="+", type=Path, metavar="FILE", help="texts to measure on (default: documentation text)"
    )
    parser.add_argument("--tokens", type=int, default=1000, help="longest prompt (default: %(default)s)")
    parser.add_argument("--count", type=int, default=2, help="prompts (default: %(default)s)")
    parser.add_argument(
        "--key-bits", nargs="+", type=int, default=list(KEY_BITS), help="bits that keys may have (default: 8 4)"
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="also measure packed tiers (PackKV), and take them where they are smaller at equal error; slower to read",
    )
    parser.add_argument("--config", metavar="JSON", help="LeanKVConfig whose window, flush and codec are kept")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="measured in (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("calibrated.json"), help="config (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run with this --out measured")


def run(args: argparse.Namespace) -> int:
    """Calibrate, write the config and its tables, print what was found; 1 where the target was missed.

    Raises:
        ValueError, OSError, ImportError: what the user can change.
    """
    start = time.perf_counter()
    target = Target(args.ratio, args.bytes_per_token, args.kl)
    base = LeanKVConfig.from_json(args.config) if args.config else None
    progress = progress_bars()
    _check_output(args.out)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = smollm2.load(args.model, dtype=DTYPES[args.dtype])
    if torch.cuda.is_available():
        model.cuda()  # type: ignore[call-arg]
    prompts = _prompts(args, tokenizer, model.config)
    keep = args.out.with_suffix(".measured.jsonl")
    if args.fresh:
        keep.unlink(missing_ok=True)
    own = _own_dtype(args.model)
    print(
        f"{args.model}, measured in {args.dtype}, bytes as in {str(own).removeprefix('torch.')}; {target} on ", end=""
    )
    print(f"{len(prompts)} prompts of up to {max(len(context) for context, _ in prompts):,} tokens")
    result = calibrate(
        model,
        prompts,
        **vars(target),
        key_bits=args.key_bits,
        packed=args.packed,
        base=base,
        dtype=own,
        keep=keep,
        made_for=f"{args.model}; hfkv {__version__} calibrate, {target}, {len(prompts)} prompts",
        progress=progress,
    )
    args.out.write_text(result.config.to_json() + "\n", encoding="utf-8")
    errors = args.out.with_suffix(".errors.csv")
    write_errors(result, errors)
    print(table(result))
    files = f"{args.out} (config), {errors} (errors by layer), {keep} (measurements, to go on from)"
    if result.choices:
        choices = args.out.with_suffix(".packing.csv")
        write_choices(result, choices)
        files += f", {choices} (bytes and KL of plain and packed tiers by layer)"
    print(f"\nWritten: {files}.")
    print(f"{time.perf_counter() - start:.0f} seconds. Use it: LeanKVCache(LeanKVConfig.from_json({str(args.out)!r}))")
    if not result.reached:
        print(f"The target was missed: {target}, reached {getattr(result.taken, target.name):.4g}.")
    return 0 if result.reached else 1


def table(result: Calibration) -> str:
    """How every layer is coded, then what the real cache did with every config that was tried."""
    lines = ["", "layer  tiers                 keys              values    KL of keys  KL of values  bytes in pages"]
    measured = any(x.packing is not None for x in result.layers)
    lines[-1] += "  packing" if measured else ""
    for x in result.layers:
        key, value = (x.option.coding(side, x.basis) for side in SIDES)
        how = "rotated" if key.rotate else "plain"
        how += ", shifted" if key.shift else ""
        lines.append(
            f"{x.index:5}  {x.option!s:<20}  {how:<18}{'rotated' if value.rotate else 'plain':<8}"
            f"{x.key_kl:12.2e}  {x.value_kl:12.2e}  {x.page_bytes:14,.0f}" + (f"  {x.packing}" if measured else "")
        )
    lines += _packing(result) if measured else []
    lines += ["", "                 predicted KL  measured KL   ratio  bytes per token"]
    for number, tried in enumerate(result.attempts):
        name = f"{'packed' if tried.config.packs else 'config'} {number + 1}" + (" *" if tried is result.taken else "")
        lines.append(
            f"{name:<16}{tried.predicted_kl:13.5f}{tried.kl:13.5f}{tried.ratio:8.4f}{tried.bytes_per_token:17,.0f}"
        )
    return "\n".join(lines)


def write_errors(result: Calibration, path: Path) -> None:
    """The error of every coding that was measured, one row each."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["layer", "side", "bits", "high_share", "rotated", "shifted", "bound", "kl"])
        for layer, errors in result.errors.items():
            for c, kl in errors.items():
                writer.writerow(
                    [layer, c.side, c.bits, c.share, int(c.rotate), int(c.shift), c.bound or "", f"{kl:.3e}"]
                )


def write_choices(result: Calibration, path: Path) -> None:
    """Bytes and error of every option of every layer, where packed tiers were measured."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["layer", "tier", "high_share", "keys_rotated", "packed", "order", "page_bytes", "kl", "taken"])
        taken = {x.index: x.option for x in result.layers}
        for layer, choices in result.choices.items():
            for option, size, kl in choices:
                tier = option.tier
                packs = (tier.sides, tier.repack) if isinstance(tier, Packed) else ("", "")
                own = (layer, tier_name(tier), option.share, "" if not option.packed else int(option.rotate_keys))
                writer.writerow([*own, *packs, f"{size:.0f}", f"{kl:.3e}", int(option == taken[layer])])


def _packing(result: Calibration) -> list[str]:
    """What packed tiers do for the whole of it."""
    plain, packed = result.best(packed=False), result.best(packed=True)
    if packed is None:
        said = "no choice with them would be better"
    elif plain is None:
        said = "only with them the target can be had"
    else:
        ends = (f"{x.bytes_per_token:,.0f} bytes per token at KL {x.kl:.5f}" for x in (packed, plain))
        said = "{} with them, {} without".format(*ends)
    return ["", f"Packed tiers: {said}; {'taken' if result.config.packs else 'not taken'}."]


def _prompts(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> list[Prompt]:
    if args.count < 1 or args.tokens < 1:
        raise ValueError(f"--count {args.count} --tokens {args.tokens}: both must be at least 1")
    if args.prompts:
        prompts = from_files(tokenizer, args.prompts, args.tokens, args.count)
    else:
        prompts = generated(tokenizer, args.tokens, args.count)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    needed = max(len(context) + len(following) for context, following in prompts)
    if limit and needed > limit:
        raise ValueError(f"prompts need {needed} positions, the model has {limit}: choose fewer --tokens")
    return prompts


def _own_dtype(model: str) -> torch.dtype:
    """The dtype that the model is stored in, whose bytes count."""
    if model == smollm2.NAME:
        return torch.bfloat16
    dtype = getattr(AutoConfig.from_pretrained(model).get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _check_output(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: there is no folder {path.parent}")


def progress_bars() -> Callable[[str, int], Callable[[], object]]:
    """Progress bars, one after another."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ImportError("progress bars need tqdm: pip install 'hfkv[eval]'") from error
    open_bar: list[tqdm] = []

    def begin(what: str, steps: int) -> Callable[[], object]:
        if open_bar:
            open_bar.pop().close()
        open_bar.append(tqdm(total=steps, desc=f"{what:<22}"))
        return open_bar[0].update

    return begin
