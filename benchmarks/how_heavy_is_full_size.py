"""How heavy is a full-size network? One posterior step of MSM's, and one training step of SSDU's, for real.

    python benchmarks/how_heavy_is_full_size.py [--what msm,ssdu]

Builds the network of the published MRI weights (138 million parameters; here with random ones, which cost the same)
and runs one step of MSM's preset "paper" on a simulated measurement, with one mask and with three, each in a process
of its own, whose peak memory is told. Operations are counted by PyTorch on tensors without data. Whatever was not
run but follows by arithmetic stands under "arithmetic, not measured".

And trains the network of recipes/ssdu.yaml for one step, as the recipe says, on a simulated slice of 16 coils at
320 x 320, whose memory is that of a GPU too, but for what its libraries take. Writes
results/how_heavy_is_full_size.json; a part that was not run stays as it was.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from msmri.config import build, load_recipe
from msmri.io.output import environment, write_manifest
from msmri.methods.msm import MSM
from msmri.model.adm import ADMConfig, ADMUNet
from msmri.model.denoiser import ComplexChannels, EpsilonVP
from msmri.tensors import generators
from msmri.testing import phantom_measurement

RESULT = Path(__file__).parent / "results" / "how_heavy_is_full_size.json"
PUBLISHED = ADMConfig()  # its defaults are the network of the published MRI weights
QUICK = replace(PUBLISHED, image_size=32, channels=32, channel_mult=(1, 1, 2), attention_resolutions=(8,))
SSDU_RECIPE = Path(__file__).parents[1] / "recipes" / "ssdu.yaml"
SSDU_QUICK = ("model.unrolls=2", "model.network.channels=8", "model.network.blocks=1")
STEPS, MASKS, TRAINING_STEPS, BATCH = 200, 3, 1_000_000, 2  # as published
RATES = (10, 50, 200)  # sustained Tera-operations a second to reckon with


def network(config: ADMConfig) -> ADMUNet:
    """Build the network with random weights everywhere, the last layers too, which start as zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        built = ADMUNet(config)
        for parameter in built.parameters():
            if parameter.ndim > 1 and not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.01)
    return built.eval().requires_grad_(False)


def count_operations(config: ADMConfig, size: int) -> int:
    """Count the floating-point operations of one pass at one image; a multiplication and an addition are two."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        built, image, t = ADMUNet(config).eval(), torch.empty(1, config.in_channels, size, size), torch.empty(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(image, t)
    return counter.get_total_flops()


def peak_memory() -> float:
    """Give the largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def resident_memory() -> float:
    """Give the resident memory of this process now, in GB; the largest so far where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory()
    return pages * resource.getpagesize() / 1e9


def ssdu_step(quick: bool) -> dict[str, Any]:
    """Run one training step of SSDU's recipe, from the measurement to new weights; the first run of the process."""
    size, coils = (32, 4) if quick else (320, 16)
    recipe = load_recipe(SSDU_RECIPE, SSDU_QUICK if quick else ())
    batch = phantom_measurement((size, size), slices=1, coils=coils)
    batch = batch.scaled(batch.centre_scale())
    loss = build(recipe["loss"])
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        model = build(recipe["model"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe["train"]["learning_rate"])
    passes: list[int] = []

    def tell(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        passes.append(len(output))
        print(f"pass {len(passes)}, {peak_memory():.2f} GB", file=sys.stderr, flush=True)

    model.network.register_forward_hook(tell)
    before, begun, used = resident_memory(), time.perf_counter(), time.process_time()
    value = loss(model, batch, torch.Generator().manual_seed(0))
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - used
    assert bool(torch.isfinite(value)) and all(bool(p.grad.any()) for p in model.parameters())
    return {
        "recipe": SSDU_RECIPE.name,
        "matrix": [size, size],
        "coils": coils,
        "unrolls": model.unrolls,
        "checkpoint": model.recomputes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "passes_through_the_network": sum(passes),  # a checkpoint runs every unroll forward twice
        "seconds": seconds,
        "cpu_seconds": cpu,
        "threads": torch.get_num_threads(),
        "memory_before_the_step_GB": before,
        "peak_memory_GB": peak_memory(),
        "growth_of_memory_GB": max(peak_memory() - before, 0.0),  # the kernel counts the two apart, to some hundred kB
    }


def step(config: ADMConfig, size: int, masks: int, coils: int) -> dict[str, Any]:
    """Run one posterior step of the published sampler and tell what it took; the first run of the process."""
    measurement = phantom_measurement((size, size), slices=1, coils=coils)
    begun = time.perf_counter()
    built = network(config)
    ready, building = peak_memory(), time.perf_counter() - begun
    passes: list[int] = []
    built.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    method = MSM.preset("paper", prior=EpsilonVP(ComplexChannels(built)), steps=1, masks_per_step=masks)
    begun = time.perf_counter()
    found = method(measurement, generators(0, 1))
    seconds = time.perf_counter() - begun
    assert bool(torch.isfinite(found.magnitude).all())
    return {
        "masks": masks,
        "seconds": seconds,
        "peak_memory_GB": peak_memory(),
        "peak_memory_before_the_step_GB": ready,
        "seconds_to_build": building,
        "images_through_the_network": sum(passes),
        "parameters": sum(parameter.numel() for parameter in built.parameters()),
    }


def arithmetic(operations: int, parameters: int) -> dict[str, Any]:
    """Reckon what was not run: a whole reconstruction, and training, from the operations of one pass."""
    passes = STEPS * MASKS
    run, training = passes * operations, TRAINING_STEPS * BATCH * 3 * operations
    return {
        "passes_a_reconstruction": passes,
        "TFLOP_a_reconstruction": run / 1e12,
        "seconds_a_reconstruction_by_TFLOP_per_second": {str(rate): run / (rate * 1e12) for rate in RATES},
        "TFLOP_of_training": training / 1e12,
        "hours_of_training_by_TFLOP_per_second": {str(rate): training / (rate * 3.6e15) for rate in RATES},
        "GB_of_weights_float32": 4 * parameters / 1e9,
        "GB_of_weights_gradients_Adam_and_average_float32": 5 * 4 * parameters / 1e9,
        "assumed": "a backward pass costs two forward ones; noisy training takes three network passes for one; memory "
        "of activations in training is not in these figures",
    }


def child(arguments: list[str]) -> dict[str, Any]:
    """Run this script in a process of its own and read the line it prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def posterior_steps(quick: bool, coils: int) -> dict[str, Any]:
    """Run both steps of MSM's, count, and tell."""
    config, size = (QUICK, 32) if quick else (PUBLISHED, 256)
    load = os.getloadavg()[0]
    more = ["--coils", str(coils), *(["--quick"] if quick else [])]
    rows = [child(["--step", str(masks), *more]) for masks in (1, MASKS)]
    operations = count_operations(config, size)
    for row in rows:
        row["TFLOP_per_second"] = row["images_through_the_network"] * operations / row["seconds"] / 1e12
    record = {
        "environment": environment(),
        "network": asdict(config),
        "matrix": [size, size],
        "coils": coils,
        "weights": "random",
        "threads": torch.get_num_threads(),
        "load_of_the_machine_before": load,
        "parameters": rows[0]["parameters"],
        "TFLOP_a_pass": operations / 1e12,
        "one_posterior_step": rows,
        "arithmetic, not measured": arithmetic(operations, rows[0]["parameters"]),
    }
    print(f"{record['parameters']:,} parameters, {operations / 1e12:.3f} TFLOP a pass at {size} x {size}")
    for row in rows:
        print(
            f"one posterior step, w = {row['masks']}: {row['seconds']:.1f} s on {record['threads']} thread(s), peak "
            f"{row['peak_memory_GB']:.2f} GB ({1e3 * row['TFLOP_per_second']:.0f} GFLOP/s)"
        )
    told = record["arithmetic, not measured"]
    print("Not measured, arithmetic from the count alone:")
    for rate in RATES:
        seconds = told["seconds_a_reconstruction_by_TFLOP_per_second"][str(rate)]
        hours = told["hours_of_training_by_TFLOP_per_second"][str(rate)]
        print(
            f"  a GPU that sustains {rate} TFLOP/s: {seconds:.1f} s for a slice ({STEPS} steps, w = {MASKS}, one "
            f"sample), {hours:,.0f} h for {TRAINING_STEPS:,} noiseless training steps of {BATCH} slices"
        )
    print(
        f"  memory: {told['GB_of_weights_float32']:.2f} GB of weights to sample, at least "
        f"{told['GB_of_weights_gradients_Adam_and_average_float32']:.2f} GB to train, activations not counted"
    )
    return record


def training_step(quick: bool) -> dict[str, Any]:
    """Run the step of SSDU's in a process of its own, and tell."""
    load = os.getloadavg()[0]
    row = child(["--ssdu-step", *(["--quick"] if quick else [])])
    print(
        f"one training step of {row['recipe']}, {row['coils']} coils, {row['matrix'][0]} x {row['matrix'][1]}: "
        f"{row['seconds']:.1f} s on {row['threads']} thread(s), memory grows by {row['growth_of_memory_GB']:.2f} GB"
    )
    return {**row, "load_of_the_machine_before": load, "environment": environment()}


def main() -> None:
    """Run the parts asked for and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network of the family: does the script work?")
    parser.add_argument("--what", default="msm,ssdu", help="msm, ssdu, or both by a comma")
    parser.add_argument("--coils", type=int, default=8, help="of MSM's step")
    parser.add_argument("--step", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--ssdu-step", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.step is not None:
        config, size = (QUICK, 32) if options.quick else (PUBLISHED, 256)
        print(json.dumps(step(config, size, options.step, options.coils)))
        return
    if options.ssdu_step:
        print(json.dumps(ssdu_step(options.quick)))
        return
    parts = options.what.split(",")
    if unknown := set(parts) - {"msm", "ssdu"}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose from msm, ssdu")
    record = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    if "msm" in parts:
        record |= posterior_steps(options.quick, options.coils)
    if "ssdu" in parts:
        record["ssdu"] = training_step(options.quick)
    write_manifest(options.out, record)


if __name__ == "__main__":
    main()
