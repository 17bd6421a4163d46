"""When to prune: notes that are still found against physical bytes, asked before and after the compression.

Notes are hidden in a text. Asked *before*: the question stands in the prompt that is compressed, as in most published
tables. Asked *after*: the prompt is compressed before anyone knows what will be asked, as in a conversation or where
one prompt serves many questions. Pruning by the attention of the last queries is made for the first case only.
"""

import argparse

from hfkv import LeanKVCache, LeanKVConfig
from hfkv.demo import smollm2
from hfkv.demo.measures import fill, finds_note, question_ids
from hfkv.demo.texts import noted_texts

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default=smollm2.NAME, help="name or path for from_pretrained")
parser.add_argument("--tokens", type=int, default=600)
parser.add_argument("--notes", type=int, default=6)
parser.add_argument("--seed", type=int, default=3)
parser.add_argument("--plot", help="write the picture here (.png or .svg); needs matplotlib")
args = parser.parse_args()

SETTINGS = {
    "nothing pruned": {"K4V2": LeanKVConfig(tiers=((4, 2),))},
    "pruned by replay (the default)": {f"{b:g}": LeanKVConfig(budget=b, window=32) for b in (0.22, 0.18, 0.14)},
    "pruned by attention": {f"{b:g}": LeanKVConfig(budget=b, window=32, score="attention") for b in (0.22, 0.18, 0.14)},
}

model, tokenizer = smollm2.load(args.model, dtype="auto", attn_implementation="leankv")
text = next(noted_texts(tokenizer, args.tokens, args.notes, args.seed))
prompt = tokenizer(f"{text.text}\n\nSo much for the documents. Now a question about them.\n")["input_ids"]
questions = [question_ids(tokenizer, note) for note in text.notes]

points: dict[str, list[tuple[float, int, int]]] = {}
for name, configs in SETTINGS.items():
    for setting, config in configs.items():
        cache = fill(model, prompt, LeanKVCache(config))
        after = sum(finds_note(model, cache, asked, value) for asked, value in questions)
        before = sum(
            finds_note(model, fill(model, prompt + asked[:-1], LeanKVCache(config)), asked[-1:], value)
            for asked, value in questions
        )
        report = cache.report()
        share = report.physical_bytes / report.exact_bytes
        points.setdefault(name, []).append((share, before, after))
        print(
            f"{name:32s} {setting:5s} {share:.3f} of the bytes   asked before: {before} of {len(questions)}   "
            f"after: {after} of {len(questions)}",
            flush=True,
        )

if args.plot:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise SystemExit(f"--plot needs matplotlib: pip install 'hfkv[demo]' ({error})") from None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, title, column in zip(axes, ("asked before the compression", "asked after it"), (1, 2), strict=True):
        for name, found in points.items():
            axis.plot(
                [p[0] for p in found], [p[column] / len(questions) for p in found], marker="o", label=name, alpha=0.8
            )
        axis.set(title=title, xlabel="physical bytes / exact bytes", ylim=(-0.05, 1.05))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"notes found, of {len(questions)}")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(args.plot, dpi=150)
    print(f"picture: {args.plot}")
