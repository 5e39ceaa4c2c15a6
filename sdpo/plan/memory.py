"""What a run needs of GPUs, nodes and disk as text, and why it cannot be trained if it does not fit."""

from sdpo.run.needs import GB, SHARE, STAGES, Size, sentence


def name_of(stage: int | None) -> str:
    """The option of `deepspeed` that a stage belongs to."""
    return next(name for name, number in STAGES.items() if number == stage)


def cheapest(size: Size, limit: float) -> str | None:
    """The fastest stage that fits into `limit` bytes per GPU; None if none does."""
    return next((name for name, stage in size.stages.items() if size.needed(stage) <= SHARE * limit), None)


def lines(size: Size, chosen: int | None, limit: float, is_auto: bool) -> list[str]:
    """The needs of a run as text: at every stage, and of the chosen one on its nodes and disk.

    `is_auto` says that the states of the optimiser were chosen for a GPU of this size.
    """
    stages = (f"{name} {size.per_gpu(stage) / GB:.3g}" for name, stage in size.stages.items())
    reference = f" and {size.reference:.3g} of a reference" if size.reference else ""
    pack = size.activations(size.pack, size.recompute) / GB
    pair = size.activations(size.pair, recompute=True) / GB
    found = [
        f"{size.weights:.3g} weights{reference}, {size.ranks} ranks on {size.nodes} nodes, {size.precision}, "
        f"optim.states={size.states}: GB per GPU (of {limit / GB:.3g}), besides activations: {', '.join(stages)}",
        f"  activations: {pack:.3g} GB for a micro-batch of {size.pack} tokens, which is halved until it fits; at "
        f"least {pair:.3g} GB for one pair of {size.pair} tokens with recomputation",
        f"  deepspeed={name_of(chosen)}: {size.per_node(chosen) / GB:.3g} GB of host memory per node; a step takes "
        f"{size.step_on_disk / GB:.3g} GB of disk, {size.checkpoint / GB:.3g} GB more while it is trained, and about "
        f"{size.fixed_seconds:.3g} s besides its updates",
    ]
    return found + ([f"  {sentence(size, size.states, limit)}"] if is_auto and size.states != "fp32" else [])


def refusal(size: Size, chosen: int | None, limit: float) -> str | None:
    """Why the chosen stage cannot work, and what can; None if it fits."""
    need = size.needed(chosen)
    if not need > SHARE * limit:
        return None
    found = cheapest(size, limit)
    advice = f"the cheapest stage that fits is deepspeed={found}" if found else "no stage fits: use more ranks or LoRA"
    usable = f"{limit / GB:.3g} GB, {SHARE:.0%} of which can be used"
    return f"deepspeed={name_of(chosen)} needs {need / GB:.3g} GB per GPU, of {usable}; {advice}"
