"""Sampling speed: a guided call against the decoder passes that it cannot do without."""

import argparse

import torch

from ..flextok_wrapper import FlexTokFromHub
from ..model.builder import preset_config
from ..utils.dtypes import precision
from .timing import add_preset, alternate, at_least_1, ratio, report, report_ratios, report_seconds, spread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_preset(parser)
    parser.add_argument("--steps", type=at_least_1, default=25, metavar="N", help="Euler steps (default: 25)")


@torch.no_grad()
def run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """All measurements as plain numbers; prints them."""
    model = FlexTokFromHub(preset_config(arguments.preset, vae_hub_path=None)).eval().to(device)
    pipeline, steps = model.pipeline, arguments.steps
    arms, rows = {}, []
    for n in arguments.batch_sizes:
        quants = torch.randn(n, model.n_registers, len(model.regularizer.levels), device=device)
        noise = torch.randn(n, pipeline.out_channels, *pipeline.default_size(), device=device)
        condition = {pipeline.latents_read_key: quants, pipeline.noise_read_key: noise}
        state = {pipeline.latents_read_key: quants, pipeline.noised_images_read_key: noise}
        state[pipeline.timesteps_read_key] = torch.full((n,), 0.5, device=device)

        def passes(state: dict = state) -> None:
            with precision(device, dtype):
                for _ in range(2 * steps):
                    model.decoder(dict(state))

        def sample(condition: dict = condition, apg: bool = True) -> None:
            with precision(device, dtype):
                pipeline(dict(condition), timesteps=steps, guidance_scale=7.5, perform_norm_guidance=apg)

        arms[f"{2 * steps} decoder passes, batch {n}"] = passes
        arms[f"{steps} steps with APG, batch {n}"] = sample
        arms[f"{steps} steps with CFG, batch {n}"] = lambda sample=sample: sample(apg=False)
    times = alternate(arms, arguments.rounds, device)
    print(f"\n{arguments.preset}, 256 px, latents only, guidance scale 7.5")
    report_seconds(times, "seconds")
    images = {}
    for n in arguments.batch_sizes:
        images[n] = spread([n / seconds for seconds in times[f"{steps} steps with APG, batch {n}"]])
        report(f"images/s with APG, batch {n}", images[n], digits=4)
        for name, limit in (("APG", 1.05), ("CFG", None)):
            guided = times[f"{steps} steps with {name}, batch {n}"]
            unguided = times[f"{2 * steps} decoder passes, batch {n}"]
            rows.append((f"{name} / decoder passes, batch {n}", ratio(guided, unguided), limit))
    return {"steps": steps, "seconds": times, "images_per_second": images, "ratios": report_ratios(rows)}
