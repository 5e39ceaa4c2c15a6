"""Rules that connect several settings."""

import ast
from pathlib import Path

from sdpo import config as configuration
from sdpo.binding import bind, inputs_of, variants
from sdpo.config import Config
from sdpo.errors import UserError
from sdpo.variants import tune
from sdpo.variants.tune import Adapter

VARIANTS = Path(__file__).parent / "variants"


def check(config: Config) -> None:
    """Raise UserError for a choice of any step that does not bind, and for settings that exclude each other."""
    for t in (0, *config.steps):
        _check_keys(configuration.for_step(config, t))
    from sdpo.curriculum import chunking  # here, because these import torch or numpy, which takes seconds
    from sdpo.evals import suites
    from sdpo.model import zero
    from sdpo.variants import loss as losses
    from sdpo.variants import placebo
    from sdpo.variants import reference as references

    if config.launch.ranks % config.launch.nodes:
        raise UserError(
            f"launch.ranks={config.launch.ranks} counts the ranks of all nodes together: use a multiple of "
            f"launch.nodes={config.launch.nodes}"
        )
    if config.launch.compile and config.deepspeed.stage == 3:
        raise UserError(
            "launch.compile: ZeRO-3 gathers parameters between layers, which a compiled graph cannot do: "
            "use launch.compile=false or another deepspeed stage"
        )
    if config.launch.kernels == "liger" and (config.launch.compile or config.launch.attention == "plain"):
        raise UserError(
            "launch.kernels=liger excludes launch.compile, which makes its own kernels, and launch.attention=plain, "
            "which runs the model as it is: use launch.kernels=auto"
        )
    if config.precision == "bf16" and config.deepspeed.stage == 1:
        raise UserError(
            "deepspeed=zero1 with precision=bf16 keeps whole fp32 gradients on every rank and needs more memory "
            "than deepspeed=zero2: use that"
        )
    if config.deepspeed.stage is not None and config.optim.states in ("8bit", "host"):
        raise UserError(
            f"optim.states={config.optim.states} runs without DeepSpeed: use deepspeed=off, or deepspeed.offload=true, "
            "which keeps AdamW's states in host memory"
        )
    if config.probe.file and config.deepspeed.stage == 3:
        raise UserError(
            "probe.file: ZeRO-3 spreads the policy over the ranks, and one rank alone cannot answer with it: "
            "use evaluate=[generate], or another deepspeed stage"
        )
    if config.model.sft and config.model.name != "lab":
        raise UserError("model.sft trains the laboratory's S; another model is taken as it is: set model.sft=null")
    zero.check_settings(config.deepspeed)
    chunking.bind_score(config.score, chunking.bind_split(config.split))
    _check_rounds(config)
    for key, measure in config.evaluate.items():
        if "name" not in measure:
            listed = ",".join([other for other in config.evaluate if other != key] + [key])
            raise UserError(
                f"evaluate.{key} has settings, but evaluate does not list it: evaluate=[{listed}] turns it on, "
                f"~evaluate.{key} removes the settings"
            )
        bind(suites, measure)
    for t in (0, *config.steps):
        step = configuration.for_step(config, t)
        keywords = bind(losses, step.loss).keywords
        if any(one.get("beta") == 0 for one in (keywords, *keywords.get("of", []))):
            raise UserError("loss.beta is 0, which gives the preferences no weight in the loss; set it above 0")
        _check_token_weights(step)
        _check_divergence(step, "divergence" in inputs_of(bind(losses, step.loss)))
        bind(references, {key: value for key, value in step.reference.items() if key != "placebo"})
        bind(placebo, {"name": step.reference.get("placebo", "none")})
        if step.optim.moments == "carry" and step.start == "initial":
            raise UserError("optim.moments=carry has nothing to carry if a step starts from S: use start=previous")
        for key in ("moments", "schedule_over", "states"):
            if key in config.steps.get(t, {}).get("optim", {}):
                raise UserError(f"steps.{t}.optim.{key}: this setting must be equal in all steps: set optim.{key}=...")
        if adapter := bind(tune, step.tune)():
            _check_adapter(adapter, step)


def _check_keys(config: Config) -> None:
    """Raise UserError for an unknown key of an open axis. Reads only source text: importing torch takes seconds."""
    for axis, shared in (("loss", set()), ("reference", {"placebo"}), ("tune", set())):
        settings = getattr(config, axis)
        nodes = ast.parse((VARIANTS / f"{axis}.py").read_text(encoding="utf-8")).body
        functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
        if function := functions.get(settings.get("name")):
            known = [argument.arg for argument in function.args.kwonlyargs]
            if unknown := settings.keys() - {"name", *known, *shared}:
                raise UserError(
                    f"sdpo.variants.{axis}.{function.name}: unknown key {min(unknown)}; {function.name} has "
                    f"{', '.join(known) or 'no settings'}"
                )


def _check_token_weights(step: Config) -> None:
    """Raise UserError if a loss with weights of tokens is combined with what cannot have them."""
    from sdpo.variants import token_weights

    weighted = variants(token_weights)
    if mixed := [part["name"] for part in step.loss.get("of", []) if part.get("name") in weighted]:
        raise UserError(f"loss=mixture cannot have {mixed[0]}, which weighs tokens: use it alone")
    if step.loss["name"] in weighted and step.reference["name"] == "external":
        raise UserError(
            f"loss={step.loss['name']} weighs tokens, and reference=external reads other tokens than the policy: use "
            "another loss or another reference"
        )


def _check_divergence(step: Config, is_read: bool) -> None:
    """Raise UserError if a loss reads the reference's whole distribution, which some settings cannot give."""
    if not is_read:
        return
    reads = f"loss={step.loss['name']} reads the whole distribution of the reference, which"
    if step.deepspeed.stage == 3:
        raise UserError(f"{reads} would be in memory whole beside ZeRO-3's parts: use another deepspeed stage")
    if step.reference["name"] == "external":
        raise UserError(f"{reads} reference=external may have over other tokens: use another reference")
    if step.reference.get("placebo", "none") != "none":
        raise UserError(f"{reads} a placebo does not have: use reference.placebo=none")


def _check_adapter(adapter: Adapter, config: Config) -> None:
    """Raise UserError if a step's configuration does not work with its adapter."""
    if config.reference["name"] == "mixed" and config.reference["alpha"] < 1 and adapter.quantize != "none":
        raise UserError(
            f"reference=mixed changes the frozen weights, which tune.quantize={adapter.quantize} holds in 4 bits: use "
            "reference=periodic, or tune.quantize=none"
        )
    if adapter.between == "stack" and config.save_dtype != "fp32" and config.precision == "fp32":
        raise UserError(
            "tune.between=stack trains on unrounded adapters, but save_dtype=bf16 would score rounded ones: "
            "use save_dtype=fp32, precision=bf16 or tune.between=merge"
        )
    if config.optim.moments == "carry":
        raise UserError(
            "optim.moments=carry has nothing to carry with tune=lora, because every step trains a new adapter: "
            "use optim.moments=reset"
        )
    if adapter.quantize != "none" and config.deepspeed.stage is not None:
        raise UserError(f"tune.quantize={adapter.quantize} runs without DeepSpeed: use deepspeed=off")


def _check_rounds(config: Config) -> None:
    """Raise UserError for on-policy rounds that cannot be judged, or whose pairs a setting cannot read."""
    rounds = config.rounds
    if rounds.name == "given":
        return
    if rounds.judge == "reward_model" and not rounds.path:
        raise UserError("rounds.path has no value; set rounds.path=... to a reward model, or use rounds.judge=gold")
    if (rounds.judge == "endpoint") != (rounds.endpoint is not None):
        raise UserError("rounds.judge=endpoint and the settings of rounds.endpoint go together: rounds=on_policy_judge")
    if rounds.judge == "gold" and config.data.name != "lab":
        raise UserError("rounds.judge=gold is the laboratory's reward; for other data use rounds.judge=reward_model")
    if config.split.get("within") == "score" and 0 < rounds.share < 1:
        raise UserError(
            "split.within=score orders given pairs, which have no place among answers: use rounds.share=1 or 0"
        )
    if any(configuration.for_step(config, t).reference["name"] == "external" for t in (0, *config.steps)):
        raise UserError("reference=external reads the data's own pairs, which rounds=on_policy does not train on")
