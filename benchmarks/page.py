"""docs/benchmarks.md, or a page of another name, and its picture, from the results of a run."""

from benchmarks import figures, targets
from benchmarks.figures import FALLS_SHORT, Spread
from benchmarks.targets import FROMZERO, KERAS_BF16, KERAS_FLOAT32, PLAIN_BF16, PLAIN_FLOAT32, SIDES

COLOURS = {
    KERAS_FLOAT32: "#f0b27a",
    KERAS_BF16: "#ca6f1e",
    PLAIN_FLOAT32: "#aab7c4",
    PLAIN_BF16: "#5d6d7e",
    FROMZERO: "#1f4e9c",
}

OPTIMIZERS = {"sgd": "SGD with momentum 0.9", "adam": "Adam"}


def write(results, path):
    """Write the page to `path` and, when training steps were measured, its picture beside it; their paths."""
    picture, page = path.with_suffix(".png"), text(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "steps" in results:
        draw(results, picture)
    path.write_text(page.replace("](benchmarks.png)", f"]({picture.name})"), "utf-8")
    return [*([picture] if "steps" in results else []), path]


def text(results):
    """The page."""
    parts = [
        ("", about_lines),
        ("## Training steps", steps_section),
        ("## The processor's ceiling", ceiling_section),
        ("## Cold starts", cold_section),
        ("## Cost that grows as the work", lifetime_section),
    ]
    lines = ["# Benchmarks"]
    for heading, part in parts:
        body = part(results)
        if body:
            lines += [heading, *body, ""] if heading else [*body, ""]
    return "\n".join(lines).rstrip() + "\n"


def about_lines(results):
    about = results["about"]
    busy = about["load_before"] > targets.IDLE
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    commit = about["commit"] or "unknown"
    commit = commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")
    return [
        f"From one run of `{about['command']}` on {about['date']}, {about.get('minutes', 0):.0f}"
        f" minutes, commit {commit}.",
        "",
        f"{about['processor']}, {held_to(about)}{about['instructions']}; {about['cores']} cores, {about['threads']}"
        f" threads; fromzero's kernels: {about.get('kernels', 'none')}; Python"
        f" {about['python']}; {versions}. Load average when it began {about['load_before']:.2f} (what else ran), when"
        f" it ended {about.get('load_after', 0):.2f}."
        + " **Other work ran when it began, so these figures are not to be trusted.**"
        * busy,
        "",
        "Every measurement is a process of its own, the sides in turn (A B A B …), as times on shared machines drift."
        f" Rounds: {about['rounds']}; figures are medians (lowest–highest), ratios are taken pair by pair within a"
        " round, whose order is turned round in every other one. Absolute figures move by tens of per cent between"
        " machines and hours, and ratios between runs, too: what stands in brackets is the spread within this one.",
        "",
        *held_to_lines(about),
        *verdicts_section(results),
    ]


def verdicts_section(results):
    if not has_targets(results):
        return ["The targets are for SGD, and none is compared here."]
    verdicts, missing = all_verdicts(results), targets.not_measured(results)
    short = [v for v in verdicts if not v.met]
    return [
        f"**{len(verdicts) - len(short)} of {len(verdicts)} targets are met**"
        + (":" if not short else f"; {len(short)} {'falls' if len(short) == 1 else 'fall'} short:"),
        "",
        *(f"- {'**' + v.line() + '**' if not v.met else v.line()}" for v in verdicts),
        *([f"- Not measured in this run: {'; '.join(missing)}"] if missing else []),
    ]


def has_targets(results):
    return results["about"].get("optimizer", "sgd") == "sgd"


def least_speedup(results, side, name):
    """How many times as many images a second as `side` fromzero is to train on a network; None without a target."""
    return targets.SPEEDUPS.get(side, {}).get(name) if has_targets(results) else None


def all_verdicts(results):
    if not has_targets(results):
        return []
    return [
        *targets.step_verdicts(results.get("steps", {})),
        *targets.cold_verdicts(results.get("cold", {})),
        *targets.lifetime_verdicts(results.get("lifetime", {})),
    ]


def verdict_lines(results):
    return [v.line() for v in all_verdicts(results)]


def steps_section(results):
    if "steps" not in results:
        return []
    about = results["about"]
    lines = [
        f"Batches of {about['batch_size']}, {OPTIMIZERS[about.get('optimizer', 'sgd')]}, random images of CIFAR-10's"
        " size and number in memory; images a second. Plain PyTorch is eager, channels_last, with a fused optimizer;"
        " Keras runs on"
        " TensorFlow, as `Sequential` and `compile`, trained as said below. fromzero's side is the whole step"
        " of a real training: it starts from uint8 pixels, checks losses and gradients and keeps the running accuracy."
        + " Whether bfloat16 learns as well as float32: [precision.md](precision.md)."
        * (about["precision"] != "float32"),
        "",
        "![Training steps](benchmarks.png)",
        "",
        *step_lines(results),
    ]
    tried = [
        (name, side, ways) for name, sides in results.get("ways", {}).items() for side, ways in sides.items() if ways
    ]
    if tried:
        ways = list(tried[0][2])
        lines += [
            "",
            "How Keras was trained, "
            + ("the median of several tries of each way, in turn" if len(ways) > 1 else "one way only")
            + " (images a second). The fastest was taken for the rounds. Without XLA is what `compile` chooses on a"
            " machine without a GPU.",
            "",
            row(["", "", *ways]),
            row(["---"] * 2 + ["---:"] * len(ways)),
        ]
        for name, side, rates in tried:
            best = max(rates.values())
            lines.append(row([name, side, *(f"**{r:,.0f}**" if r == best else f"{r:,.0f}" for r in rates.values())]))
    return lines


def step_lines(results):
    """The table of training steps, in Markdown."""
    about = results["about"]
    target_column = ["target"] * has_targets(results)
    header = ["network", "side", "images/s", "fromzero ÷ it", *target_column, "GFLOP/s", "of its precision's ceiling"]
    lines = [row(header), row(["---", "---", *["---:"] * (len(header) - 2)])]
    for name, sides in results["steps"].items():
        flop = results["work"][name]["flop"]
        for side, rates in sides.items():
            precision = precision_of(side, about)
            ratio = target = ""
            if side != FROMZERO and FROMZERO in sides:
                speedup = targets.speedup(sides, side)
                ratio = f"{speedup.text('.2f')} ×"
                least = least_speedup(results, side, name)
                if least is not None:
                    target = f"≥ {least:g} ×" + ("" if speedup.median >= least else f" **{FALLS_SHORT}**")
            share = targets.share_of_ceiling(rates, precision, flop, results["ceiling"])
            speed = Spread.of(rates).median * flop / 1e9
            compared = [ratio, target] if target_column else [ratio]
            lines.append(row([name, side, Spread.of(rates).text(), *compared, f"{speed:,.0f}", share.text(".0%")]))
    return lines


def ceiling_section(results):
    if not results.get("ceiling"):
        return []
    found = results["ceiling"]
    lines = [
        "The fastest that PyTorch's library computes here, measured in every round: matrix products of square matrices"
        " and forward 3×3 convolutions of 128 images, each at its best size. A network's ceiling is the faster of the"
        " two over its multiply-adds, as if nothing else cost time.",
        *kernels_note(results["about"]),
        "",
        row(["", "matrix product, GFLOP/s", "convolution, GFLOP/s", *results["work"]]),
        row(["---"] + ["---:"] * (2 + len(results["work"]))),
    ]
    measured = [name for name in ("bfloat16", "float32") if name in results["ceiling"][0]]
    for precision in measured:
        product, convolution = (
            Spread.of([f[precision][kind][1] for f in found]).text() for kind in ("product", "convolution")
        )
        rate = Spread.of([targets.ceiling_gigaflops(f, precision) for f in found]).median
        at = [f"{figures.images_per_second_at(rate, work['flop']):,.0f} images/s" for work in results["work"].values()]
        lines.append(row([precision, product, convolution, *at]))
    work = ", ".join(
        f"{name} {w['flop'] / 1e9:.3f} GFLOP ({w['parameters']:,} parameters)" for name, w in results["work"].items()
    )
    copy = Spread.of([f["copy_gigabytes_per_second"] for f in found]).text(".1f")
    lines = [
        *lines,
        "",
        f"The work of training on an image, forward and backward, two operations a multiply-add: {work}. Copying"
        f" memory: {copy} GB/s.",
        "",
        *room_lines(results),
    ]
    if len(measured) < 2:
        return lines[:-1]
    by_precision = [[targets.ceiling_gigaflops(f, precision) for f in found] for precision in measured]
    gain = Spread.of(figures.ratios(*by_precision))
    return [
        *lines,
        f"bfloat16 computes {gain.text('.1f')} times as fast as float32 here ({feature_note(results['about'])}). That"
        " decides the ratios to float32: with AMX (`amx_bf16`) the processor multiplies bfloat16 several times as"
        " fast as float32, with `avx512_bf16` alone about twice, and without either fromzero computes in float32."
        " Figures from processors that differ in this cannot be compared.",
    ]


def room_lines(results):
    """How many times as fast as Keras in float32 the ceiling is: a target above that is out of reach here."""
    precision, ceilings = results["about"]["precision"], results["ceiling"]
    cells = []
    for name, sides in results["steps"].items():
        if KERAS_FLOAT32 in sides:
            flop = results["work"][name]["flop"]
            share = targets.share_of_ceiling(sides[KERAS_FLOAT32], precision, flop, ceilings)
            cells.append(f"{name} {1 / share.median:.1f} ×")
    if not cells:
        return []
    return [
        f"The ceiling in {precision} over Keras float32, the most that the library's products allow:"
        f" {', '.join(cells)}.",
        "",
    ]


def kernels_note(about):
    if about.get("kernels", "none") == "none":
        return []
    return [
        "fromzero's kernels compute 3×3 convolutions by Winograd's method, with a quarter of the multiplications that"
        " are counted here, so they alone could pass this ceiling.",
    ]


def held_to(about):
    return "all sides held to " if about.get("held_to") else ""


def held_to_lines(about):
    if not about.get("held_to"):
        return []
    return [
        f"Held to {about['held_to']}, PyTorch, oneDNN, MKL, XLA and fromzero's kernels use no newer instructions, to"
        " stand in for a laptop; bfloat16 would be slow, so all use float32."
        + " The targets are those for processors that are fast at bfloat16."
        * (about.get("optimizer", "sgd") == "sgd"),
        "",
    ]


def feature_note(about):
    instructions = about["instructions"].split()
    for feature in ("amx_bf16", "avx512_bf16"):
        if feature in instructions:
            return f"the processor has {feature}"
    return "the processor has no bfloat16 instructions"


def precision_of(side, about):
    if side == FROMZERO:
        return about["precision"]
    return "float32" if side in (KERAS_FLOAT32, PLAIN_FLOAT32) else "bfloat16"


def cold_section(results):
    if not results.get("cold"):
        return []
    lines = [
        "`fromzero train cifar10 --recipe NAME --seed N`, N from 0, from the start of its process until it has printed"
        " its test accuracy: interpreter, imports, reading the images, training, checkpoints, scoring the test images"
        " once; fromzero's kernels had been compiled before. To its end it also draws its curves."
        " In turn with Keras float32's training steps of train 3, whose epoch is 50,000 images at the rate measured"
        " before and after each run; Keras's own start is not counted.",
        "",
        row(
            [
                "recipe",
                "runs",
                "seconds",
                "to its end",
                "Keras's epoch, seconds",
                "epochs of Keras",
                "target",
                "test accuracy",
            ]
        ),
        row(["---"] + ["---:"] * 7),
    ]
    for name, found in results["cold"].items():
        epochs = Spread.of(figures.ratios(found["seconds"], found["keras_epoch_seconds"]))
        goal = targets.GOALS.get(name)
        target = ""
        if goal:
            target = f"< {goal.keras_epochs:g}" + ("" if epochs.median <= goal.keras_epochs else f" **{FALLS_SHORT}**")
        times = [
            Spread.of(found[key]).text(".1f") if key in found else ""
            for key in ("seconds", "end_seconds", "keras_epoch_seconds")
        ]
        accuracy = Spread.of(found["accuracy"]).text(".4f")
        lines.append(row([name, str(len(found["seconds"])), *times, epochs.text(".3f"), target, accuracy]))
    ways = sorted({found["keras_way"] for found in results["cold"].values() if "keras_way" in found})
    failed = [f"{name} failed: {why}." for name, why in results.get("cold_failed", {}).items()]
    said = [*(f"Keras was trained by `{way}`." for way in ways), *failed]
    return [*lines, *(["", " ".join(said)] if said else [])]


def lifetime_section(results):
    found = results.get("lifetime")
    if not found:
        return []
    lines = []
    if linear := found.get("linear"):
        blocks = {int(images): [] for images in linear[0]["seconds"]}
        for round_ in linear:
            for images, seconds in round_["seconds"].items():
                blocks[int(images)] += [1e3 * s / round_["block_steps"] for s in seconds]
        cells = [f"{images:,} images {Spread.of(times).text('.1f')} ms" for images, times in blocks.items()]
        lines.append(
            f"- A step of {linear[0]['recipe']}, in runs on fewer and more images in turn, {linear[0]['block_steps']}"
            f" steps at a time: {', '.join(cells)} ({len(next(iter(blocks.values())))} blocks each; the verdict is on"
            " the median of each round's pairs)."
        )
    if starts := found.get("start_seconds"):
        lines.append(
            f"- Process start to the end of the first step, train 3 on CIFAR-10: {Spread.of(starts).text('.1f')} s."
        )
    if epochs := found.get("epochs"):
        of = {key: Spread.of([epoch[key] for epoch in epochs]) for key in epochs[0] if key != "recipe"}
        lines += [
            f"- An epoch of {epochs[0]['recipe']} on CIFAR-10: {of['epoch_seconds'].text('.1f')} s of steps; evaluating"
            f" 10,000 images {of['evaluation_seconds'].text('.2f')} s; peak memory of the process at most"
            f" {max(epoch['peak_bytes'] for epoch in epochs) / 1e9:.2f} GB.",
        ]
    if late := found.get("late_by_early"):
        pairs = [ratio for round_ in late for ratio in round_["ratios"]]
        lines.append(
            f"- Steps of {late[0]['recipe']} after an epoch and steps of a run just begun, in turn,"
            f" {late[0]['block_steps']} at a time: the former take {Spread.of(pairs).text('.2f')} times as long"
            f" ({len(pairs)} pairs, of {len(late)} pairs of runs; the verdict is on the median of each pair of runs)."
        )
    for what, reason in found.get("not_measured", {}).items():
        lines.append(f"- Not measured in every round: {what}: {reason}")
    return lines


def row(cells):
    return "| " + " | ".join(cells) + " |"


def draw(results, path):
    """Images a second of every side with the ceiling, and fromzero's ratio to each with the targets."""
    from matplotlib.figure import Figure

    steps, about = results["steps"], results["about"]
    figure = Figure(figsize=(10, 1.4 + 1.5 * len(steps)), layout="constrained")
    speeds, speedups = figure.subplots(1, 2)
    shown = [side for side in SIDES if all(side in sides for sides in steps.values())]
    peers = [side for side in shown if side != FROMZERO]
    for axes, sides_shown in ((speeds, shown), (speedups, peers if FROMZERO in shown else [])):
        height = 0.8 / max(len(sides_shown), 1)
        for n, (name, sides) in enumerate(steps.items()):
            for m, side in enumerate(sides_shown):
                found = Spread.of(sides[side]) if axes is speeds else targets.speedup(sides, side)
                y = n + (m - (len(sides_shown) - 1) / 2) * height
                errors = [[found.median - found.lowest], [found.highest - found.median]]
                label = side if n == 0 else None
                if axes is speeds:  # no bars on a log scale: it has no zero for them to begin at
                    axes.errorbar(found.median, y, xerr=errors, fmt="o", color=COLOURS[side], label=label, lw=2)
                else:
                    axes.barh(y, found.median, 0.9 * height, color=COLOURS[side], xerr=errors, ecolor="#333")
                least = least_speedup(results, side, name) if axes is speedups else None
                if least is not None:
                    axes.plot([least] * 2, [y - height / 2, y + height / 2], color="#c0392b", lw=2)
        axes.set_yticks(range(len(steps)), steps)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for n, name in enumerate(steps):
        rate = Spread.of(
            [targets.ceiling_gigaflops(f, results["about"].get("precision", "bfloat16")) for f in results["ceiling"]]
        )
        allowed = figures.images_per_second_at(rate.median, results["work"][name]["flop"])
        label = f"the processor's ceiling in {about['precision']}" if n == 0 else None
        speeds.plot([allowed] * 2, [n - 0.42, n + 0.42], color="#c0392b", ls=":", lw=1.6, label=label)
    speeds.set_xscale("log")
    low, high = speeds.get_xlim()
    ticks = [digit * 10**power for power in range(7) for digit in (1, 2, 5) if low <= digit * 10**power <= high]
    speeds.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    speeds.minorticks_off()
    speeds.set_xlabel("training steps, images a second (log scale)")
    speeds.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    speedups.axvline(1, color="#333", lw=1)
    speedups.set_xlabel("fromzero ÷ the other side, pair by pair" + " (red: target)" * has_targets(results))
    figure.suptitle(
        f"{about['processor']}, {held_to(about)}{about['instructions']}, {about['cores']} cores ·"
        f" {OPTIMIZERS[about.get('optimizer', 'sgd')]} · {about['date'][:10]}"
        f" · median of {about['rounds']}, lowest to highest",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
