"""Training methods beside their base, best-of-n and training on the best of n, at equal reward calls.

    python -m tests.benchmarks.methods --out runs/methods --only ddpo raft --seeds 0 1 2
    python -m tests.benchmarks.methods --out runs/methods --tables

A job is one method with one seed: its shipped recipe, changed as `METHODS` says, in a folder of its own. A killed job
goes on from its checkpoint, and a finished one is not run again. Everything is drawn in six steps with noise, without
guidance, but for what `raft` learns from; there is no warm-up, which would spend samples at a rate near 0. The test
prompts are read at the end of a job, with two images each; the report of its run shows the first eight.

Every method has 4,096 scored samples, but for `b2_diffurl_long`, which has as many evaluations as `ddpo`, and
`ddpo_long`, which has 38,400 samples; evaluations and time are told beside them. Methods on pairs have the best and the
worst of four for each of 512 prompts, twice; training on the best of n has the best of 8 for each of 512 prompts, drawn
once from the base, and `raft` the best of 4, drawn with guidance in four rounds.

Best-of-n spends the budget on the test images themselves, each of 256 prompts twice; with guidance an image costs twice
the evaluations, so there are half as many.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from diffalign import rewards
from diffalign.config import Recipe, load_recipe
from diffalign.data import read_prompts, write_pairs
from diffalign.engine.evaluate import Evaluation, image_diversity, sample_images, score_images
from diffalign.engine.load import load_policy
from diffalign.engine.pairs import LeftOut, draw_pairs
from diffalign.engine.run import train
from diffalign.engine.tracking import read_metrics
from diffalign.laws import default_law
from diffalign.rollout import rollout, transition
from tests.benchmarks.methods_tables import tables

PROMPTS, IMAGES, N = 256, 2, 8
REWARD_CALLS = PROMPTS * IMAGES * N
PAIR_PROMPTS, OF_PAIR = 512, 4
STEPS = 6
JUDGES = ("shapes-clip", "shapes-preference", "shapes-oracle")
ETA = {"shapes-sd": 1.0, "shapes-sd3": 0.7}


@dataclass(frozen=True)
class Job:
    """A method of the table.

    Attributes:
        pipeline: of the zoo.
        recipe: shipped.
        own: what differs from it.
        steps: of training; None: as many as the budget of samples pays for. Methods on pairs need a number, and one
            that is to spend another budget.
    """

    pipeline: str
    recipe: str
    own: tuple[str, ...] = ()
    steps: int | None = None

    @property
    def on_pairs(self) -> bool:
        return self.recipe.endswith("-dpo")


BEST_OF_N = (  # at higher rates the policy learns the faults of its own images faster than what chose between them
    f"num_prompts_per_step={REWARD_CALLS // N}",
    f"group_size={N}",
    "method.num_inner_epochs=4",
    "method.num_minibatches=16",
    "learning_rate=5e-5",
)
GUIDED = (  # four rounds of it; what guidance draws is better than what was learned without
    "method.guidance_scale=2",
    f"num_prompts_per_step={REWARD_CALLS // 16}",
    "group_size=4",
    "method.num_inner_epochs=4",
    "method.num_minibatches=8",
    "learning_rate=2e-4",
)
FLOW = ("pipeline.path=zoo:shapes-sd3", "pipeline.max_sequence_length=16")  # few tokens are as good, and faster
METHODS = {
    "reward_backprop": Job("shapes-sd", "shapes-sd-alignprop"),
    "ddpo": Job("shapes-sd", "shapes-sd-ddpo"),
    "ddpo_long": Job("shapes-sd", "shapes-sd-ddpo", ("learning_rate=3e-3",), steps=200),  # nine times the samples
    "b2_diffurl": Job("shapes-sd", "shapes-sd-b2-diffurl"),
    "b2_diffurl_long": Job("shapes-sd", "shapes-sd-b2-diffurl", steps=39),  # as many evaluations as ddpo
    "prdp": Job("shapes-sd", "shapes-sd-prdp"),
    "raft": Job("shapes-sd", "shapes-sd-raft", GUIDED),
    "sft_best_of_n": Job("shapes-sd", "shapes-sd-raft", BEST_OF_N),
    "diffusion_dpo": Job("shapes-sd", "shapes-sd-dpo", steps=128),
    "flow_grpo": Job("shapes-sd3", "shapes-sd3-flow-grpo", ("method.window=null", "method.min_std=0.1")),
    "nft": Job("shapes-sd3", "shapes-sd3-nft", ("learning_rate=1e-3",)),
    "rwr": Job("shapes-sd3", "shapes-sd3-flow-rwr"),
    "dragon": Job("shapes-sd3", "shapes-sd3-dragon-frechet", ("rewards.train=[shapes-clip]", "learning_rate=1e-3")),
    "flow_sft_best_of_n": Job("shapes-sd3", "shapes-sd-raft", (*FLOW, *BEST_OF_N)),
    "flow_dpo": Job("shapes-sd3", "shapes-sd3-flow-dpo", steps=128),
}
SEARCHES = {  # name: (pipeline, guidance, n): twice the evaluations with guidance, so half the images
    f"best of {N}": ("shapes-sd", 1.0, N),
    f"best of {N // 2}, guidance 2": ("shapes-sd", 2.0, N // 2),
    f"flow: best of {N}": ("shapes-sd3", 1.0, N),
    f"flow: best of {N // 2}, guidance 2": ("shapes-sd3", 2.0, N // 2),
}
TUNED_SEARCHES = {"ddpo_long, best of 2": ("ddpo_long", 2)}  # name: (method, n)


def recipe_of(name: str, seed: int, folder: Path, *other: str) -> Recipe:
    """The recipe of a job, changed by `other`, with as many training steps as the budget pays for."""
    job = METHODS[name]
    how = {"num_inference_steps": STEPS, "guidance_scale": 1, "eta": ETA[job.pipeline]}
    drawn_at = [f"evaluation.{key}={value}" for key, value in how.items()]
    trained_at = [f"method.pairs={pairs_file(job.pipeline, seed, folder.parent)}"]
    if not job.on_pairs:
        trained_at = [f"method.{key}={value}" for key, value in how.items()]
    few = [
        "evaluation.num_test_prompts=8",
        "evaluation.num_validation_prompts=32",
        "evaluation.validation_steps=1000",
        "lr_warmup_steps=0",
    ]
    own = [*trained_at, *job.own, *drawn_at, *few, f"seed={seed}", f"output_dir={folder}", *other]
    recipe = load_recipe(job.recipe, own, absent=["method.pairs"])
    steps = job.steps or REWARD_CALLS // (recipe.num_prompts_per_step * recipe.group_size)
    resume = "latest" if folder.exists() else None
    return recipe.model_copy(update={"max_train_steps": steps, "resume_from_checkpoint": resume})


def pairs_file(pipeline: str, seed: int, out: Path) -> Path:
    """Where the pairs of a pipeline and seed are."""
    return out / f"pairs-{pipeline}.{seed}.parquet"


def make_pairs(recipe: Recipe, seed: int) -> None:
    """Draw what a recipe trains on, unless it is there: the best and the worst of four, over and over again."""
    path = Path(recipe.method.pairs)  # type: ignore[attr-defined]
    if path.exists():
        return
    policy, reward = load_policy(recipe.pipeline), rewards.load(JUDGES[0])
    settings = recipe.evaluation.model_copy(update={"num_images_per_prompt": OF_PAIR, "batch_size": 64})
    prompts = read_prompts("prompts:shapes-train")[:PAIR_PROMPTS]
    rounds = range(REWARD_CALLS // (PAIR_PROMPTS * OF_PAIR))
    drawn = (draw_pairs(policy, prompts, reward, settings, 1000 * seed + i, LeftOut()) for i in rounds)
    write_pairs(path, chain.from_iterable(drawn))


def drawn(policy, pipeline, seed, guidance_scale=1.0, n=1, count=PROMPTS, images=IMAGES) -> Evaluation:
    """Images of the first test prompts, the best of n by the training reward, with every judge's score."""
    judges = {name: rewards.load(name) for name in JUDGES}
    prompts = read_prompts("prompts:shapes-test")[:count]
    how = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale, "eta": ETA[pipeline], "batch_size": 64}
    pool = sample_images(policy, prompts, seed=seed, num_images_per_prompt=images * n, **how)
    score_images(pool, {JUDGES[0]: judges[JUDGES[0]]})
    best = pool.scores[JUDGES[0]].reshape(-1, n).argmax(1) + torch.arange(0, len(pool.images), n)
    chosen = Evaluation([pool.prompts[i] for i in best.tolist()], pool.images[best], ledger=pool.ledger)
    return score_images(chosen, judges)


@torch.no_grad()
def chain_kl(policy, pipeline, seed) -> float:
    """Mean over 64 test prompts of KL(policy || base) of the whole chain, in nats, by the sum of its steps' KL."""
    prompts = read_prompts("prompts:shapes-test")[:64]
    condition, schedule = policy.encode([p.text for p in prompts]), policy.schedule(STEPS)
    law = default_law(schedule.kind, ETA[pipeline])
    rows = [(p.id, 0) for p in prompts]
    taken = rollout(
        policy,
        condition,
        law,
        schedule,
        rows=rows,
        seed=seed,
        guidance_scale=1.0,
        record_states=True,
        record_transitions=True,
    )
    total = torch.zeros(len(rows))
    with policy.reference():
        for step in taken.stochastic.nonzero().flatten().tolist():
            base = transition(policy, taken, condition, law, schedule, step, guidance_scale=1.0)
            total += taken.transitions[step].kl(base, "sum").cpu()
    return float(total.mean())


def measured(policy, pipeline, seed, **search) -> dict:
    """What the table says of images: (256, 2) scores of each judge, and the diversity of each prompt's."""
    found = drawn(policy, pipeline, seed, **search)
    spread = image_diversity(found, {name: rewards.load(name) for name in JUDGES})
    scores = {name: value.double().reshape(-1, IMAGES).tolist() for name, value in found.scores.items()}
    cost = {"nfe": found.ledger.denoiser_evaluations, "reward_calls": len(found.prompts) * search.get("n", 1)}
    return {"scores": scores, "diversity": list(spread.of_prompt.values()), "cost": cost}


def run_method(name: str, seed: int, folder: Path) -> dict:
    """Train, and measure the adapter on the test prompts."""
    pipeline, recipe = METHODS[name].pipeline, recipe_of(name, seed, folder)
    cost = dict.fromkeys(("nfe", "backward_passes", "reward_calls", "seconds"), 0.0)
    if METHODS[name].on_pairs:
        make_pairs(recipe, seed)
        cost |= {"reward_calls": REWARD_CALLS, "nfe": REWARD_CALLS * STEPS}
    if not (folder / "lora").exists():
        train(recipe)
    for row in read_metrics(folder / "metrics.jsonl"):
        if "nfe" in row:
            cost = {key: value + row.get(key, 0) for key, value in cost.items()}
    policy = load_policy(recipe.pipeline)
    policy.load_lora(str(folder / "lora"))
    return measured(policy, pipeline, seed) | {"kl": chain_kl(policy, pipeline, seed), "cost": cost}


def run_search(pipeline: str, seed: int, guidance_scale: float, n: int, lora: Path | None = None) -> dict:
    """Measure the best of n images of the untrained pipeline, or of one with an adapter."""
    recipe = next(job.recipe for job in METHODS.values() if job.pipeline == pipeline)
    policy = load_policy(load_recipe(recipe).pipeline)
    if lora is not None:
        policy.load_lora(str(lora))
    return measured(policy, pipeline, seed, guidance_scale=guidance_scale, n=n)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipelines = dict.fromkeys(METHODS[name].pipeline for name in args.only)
    searches = {f"base of {pipeline}": (pipeline, 1.0, 1) for pipeline in pipelines}
    searches |= {name: about for name, about in SEARCHES.items() if about[0] in pipelines}
    for seed in [] if args.tables else args.seeds:
        tuned = [name for name, (method, _) in TUNED_SEARCHES.items() if method in args.only]
        for name in [*searches, *args.only, *tuned]:
            path = args.out / f"{name.replace(' ', '-')}.{seed}.json"
            if path.exists():
                continue
            if name in METHODS:
                pipeline, found = METHODS[name].pipeline, run_method(name, seed, args.out / f"{name}.{seed}")
            elif name in TUNED_SEARCHES:
                method, n = TUNED_SEARCHES[name]
                pipeline, lora = METHODS[method].pipeline, args.out / f"{method}.{seed}" / "lora"
                found = run_search(pipeline, seed, 1.0, n, lora)
            else:
                pipeline, scale, n = searches[name]
                found = run_search(pipeline, seed, scale, n)
            path.write_text(json.dumps(found | {"name": name, "seed": seed, "pipeline": pipeline}))
            print(f"{name}, seed {seed}: done", flush=True)
    tables([json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))])


if __name__ == "__main__":
    main()
