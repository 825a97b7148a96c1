"""A second trainer to check the first one by: a run in plain PyTorch, written from the READMEs and the papers.

It takes the model's modules, random draws by address and datasets from the package, but nothing of train_flextok.py, of
flextok/training (its settings are read) or of the REPA loss. An optimizer step is one pass over its whole global batch,
AdamW and the sampler are written out. For pixel models in fp32 on the CPU.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from flextok.data.batch import chosen_to_validate, spread
from flextok.utils.random import PICTURE_STEP, RANDOM_KEY, TOKENS_STEP, VALIDATION_STEP, BatchRandom, generator


def images_of(dataset, items) -> torch.Tensor:
    """[N, 3, H, W] of a dataset's items, by index or (index, step, position)."""
    items = [dataset[item] for item in items]
    return torch.stack([item["image"] if isinstance(item, dict) else item[0] for item in items])


def by_position(seed: int, step: int, n: int) -> BatchRandom:
    return BatchRandom(seed, step, torch.arange(n), n)


def latents_of(model, images: torch.Tensor) -> torch.Tensor:
    return 0.5 * F.pixel_unshuffle(images, model.vae.downsample_factor)


def noise_levels(model, draws: BatchRandom) -> torch.Tensor:
    """Sigmas [N]: strata of the whole batch, logit-normal or SD3's mode sampling, shifted."""
    flow, u = model.flow_matching_noise_module, draws.uniform("sigma")
    if flow.stratisfied:
        u = (draws.positions + u) / draws.global_batch_size
    if flow.ln:
        sigma = torch.sigmoid(flow.ln_mean + flow.ln_std * torch.special.ndtri(u))
    else:
        sigma = 1 - u - flow.mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    return (flow.shift * sigma / (1 + (flow.shift - 1) * sigma)).float()


def velocity_of(model, quants, noised, sigma, **data) -> torch.Tensor:
    data.update(enc_registers_quant=quants, vae_latents_noised=noised, timesteps=sigma)
    return model.decoder(data)["vae_latents_reconst"]


def losses_of(model, images, draws, readout=None, repa=None) -> dict[str, torch.Tensor]:
    """The losses of a batch; `repa`: the settings of a run that aligns, its encoder, and the projectors by layer."""
    latents = latents_of(model, images)
    data = model.regularizer(model.encoder({"vae_latents": latents, RANDOM_KEY: draws}))
    quants, n_registers = data["enc_registers_quant"], data["enc_registers_quant"].shape[1]
    noise, sigma = draws.normal("flow_noise", latents.shape[1:]), noise_levels(model, draws)
    noised = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
    seen = {RANDOM_KEY: draws} if model.training else {"eval_keep_k": draws.integers("keep_k", 1, n_registers)}
    kept, handles = {}, []
    for layer in repa["projectors"] if repa else ():
        block = model.decoder.module_dict["dec_transformer"].blocks[layer]
        keep = lambda module, inputs, output, layer=layer: kept.update({layer: output})  # noqa: E731
        handles.append(block.register_forward_hook(keep))
    velocity = velocity_of(model, quants, noised, sigma, **seen)
    losses = {"flow_loss": (velocity - (noise - latents)).square().mean()}
    if readout is not None and model.training:
        k = draws.integers("readout/keep_k", 1, n_registers)
        first = torch.stack([torch.cat([q[:n], torch.zeros_like(q[n:])]) for q, n in zip(quants, k.tolist())])
        losses["readout_loss"] = (readout(first.flatten(1)) - latents.flatten(1)).square().mean()
    for handle in handles:
        handle.remove()
    if repa:
        target = targets_of(images, repa)
        side = latents.shape[-1] // 2  # patches of 2x2 latents, which come before the registers
        for layer, projector in repa["projectors"].items():
            features = kept[layer][:, : side**2].transpose(1, 2).unflatten(2, (side, side))
            features = F.interpolate(features, repa["size"], mode="bilinear").movedim(1, -1)
            losses[f"repa_loss_layer_{layer}"] = -F.cosine_similarity(projector(features), target, dim=-1).mean()
        losses["repa_loss"] = sum(losses[f"repa_loss_layer_{i}"] for i in repa["projectors"]) / len(repa["projectors"])
    return losses


@torch.no_grad()
def targets_of(images, repa) -> torch.Tensor:
    """The encoder's features on the target grid, [N, h, w, C]."""
    return F.interpolate(repa["encoder"](images), repa["size"], mode="bilinear").movedim(1, -1)


def constant_predictions(config, train, val, repa) -> dict[str, float]:
    """REPA's loss of the best vector for each position, and for all, fitted to training images."""
    n = min(config.repa_constant_images, len(train))
    indices = {"train": spread(n, len(train)), "val": chosen_to_validate(config.val_images or len(val), len(val))}
    units = {
        split: F.normalize(targets_of(images_of(data, indices[split]), repa), dim=-1)
        for split, data in (("train", train), ("val", val))
    }
    best = units["train"].mean(0)
    best = {"constant": best, "mean": best.mean((0, 1)).expand_as(best)}
    return {
        f"{split}/repa_loss_{name}": -F.cosine_similarity(unit, vector[None], dim=-1).mean().item()
        for split, unit in units.items() for name, vector in best.items()
    }  # fmt: skip


@torch.no_grad()
def tokens_of(model, config, val) -> tuple[dict[str, float], torch.Tensor]:
    """How validation images use their tokens, and the tokens."""
    n = min(config.val_token_images, len(val))
    draws, latents = by_position(0, TOKENS_STEP, n), latents_of(model, images_of(val, spread(n, len(val))))
    data = model.regularizer(model.encoder({"vae_latents": latents}))
    quants, tokens, metrics = data["enc_registers_quant"], data["tokens"], {}
    noise, drawn = draws.normal("flow_noise", latents.shape[1:]), noise_levels(model, draws)
    at = {f"k{k}": (k, drawn) for k in (1, 4, 8)}
    at |= {f"t{t}": (8, torch.full((n,), t)) for t in (0.1, 0.3, 0.5, 0.7, 0.9)}
    for name, (k, sigma) in at.items():
        noised = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
        velocity = velocity_of(model, quants, noised, sigma, eval_keep_k=[k] * n)
        metrics[f"val/flow_loss_{name}"] = (velocity - noise + latents).square().mean().item()
    for position in (1, 2, 4):
        counts = tokens[:, position - 1].unique(return_counts=True)[1]
        metrics[f"val/codes_distinct_{position}"] = len(counts) / n
        metrics[f"val/codes_entropy_{position}"] = -sum(c / n * math.log2(c / n) for c in counts.tolist())
    return metrics, tokens


@torch.no_grad()
def columns_of(model, config, val, indices, scale) -> dict[str, torch.Tensor]:
    """Columns of a picture: Euler steps from noise to latents, with classifier-free guidance."""
    images, n = images_of(val, indices), len(indices)
    latents, shift = latents_of(model, images), model.flow_matching_noise_module.shift
    quants = model.regularizer(model.encoder({"vae_latents": latents}))["enc_registers_quant"]
    times = [i / config.inference_steps for i in range(config.inference_steps, -1, -1)]
    times = [shift * t / (1 + (shift - 1) * t) for t in times]
    columns = {"VAE": images}
    for k in sorted(config.vis_token_counts):
        x = by_position(0, PICTURE_STEP, n).normal("picture", latents.shape[1:])
        for t, following in zip(times, times[1:]):
            with_tokens, without = (
                velocity_of(model, quants, x, torch.full((n,), t), eval_keep_k=[k] * n, eval_dropout_mask=[null] * n)
                for null in (False, True)
            )
            x = x + (following - t) * (without + scale * (with_tokens - without))
        columns[k] = (F.pixel_shuffle(x, model.vae.downsample_factor) / 0.5).clamp(-1, 1)
    return {**columns, "original": images}


def repa_weight(config, step: int) -> float:
    weight = config.repa_weight * min(1.0, (step + 1) / config.repa_warmup_steps)
    left = config.repa_stop - step
    if left < config.repa_cooldown_steps:
        weight *= (1 - math.cos(math.pi * left / config.repa_cooldown_steps)) / 2
    return weight if left > 0 else 0.0


def rate(config, base: float, step: int, last: int) -> float:
    """The learning rate of a step, of steps 0 to `last`: warm-up, then wsd or cosine."""
    if step < config.warmup_steps:
        return base * (step + 1) / config.warmup_steps
    if config.scheduler == "wsd":
        return config.min_lr + (base - config.min_lr) * min(1.0, (last - step) / config.decay_steps)
    progress = (step - config.warmup_steps) / (last - config.warmup_steps)
    return config.min_lr + (base - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def reference_run(configs, model, train, val, addressed=True, encoder=None, nan_step=None) -> tuple[list, dict]:
    """What metrics.jsonl holds of a run but for timing, and the run's final state.

    Args:
        configs: TrainConfig by the step from which it is in force: {0: ..., 5: ...} is stopped after 5 and resumed.
        addressed: Images come shuffled by epoch and by (index, step, position), as from flextok.data; else in order.
        nan_step: Step, from 0, whose loss becomes NaN.
    """
    config, n_train = configs[0], len(train)
    global_batch = config.batch_size * config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(n_train / global_batch)
    total = config.num_epochs * steps_per_epoch
    model = copy.deepcopy(model)
    averaged, readout, repa = copy.deepcopy(model) if config.use_ema else model, None, None
    parts = {"encoder": model.encoder, "decoder": model.decoder}
    if config.use_repa:
        dims = (model.decoder.module_dict["dec_transformer"].dim, *[config.repa_projector_hidden] * 2, encoder.dim)
        parts["repa_projector"] = nn.ModuleList()
        for i in range(len(config.repa_layers)):
            linears, draws = [nn.Linear(*pair) for pair in zip(dims, dims[1:])], [i] if i else []
            draws = generator(config.seed, "repa_projector", *draws)
            for linear in linears:
                nn.init.xavier_uniform_(linear.weight, generator=draws)
                nn.init.zeros_(linear.bias)
            layers = nn.Sequential(linears[0], nn.SiLU(), linears[1], nn.SiLU(), linears[2])
            parts["repa_projector"].append(nn.ModuleDict({"layers": layers}))
        projectors = {i: projector["layers"] for i, projector in zip(config.repa_layers, parts["repa_projector"])}
        repa = {"encoder": encoder, "size": config.repa_target_size, "projectors": projectors}
    if config.readout_weight:
        latents = latents_of(model, images_of(train, [0]))
        readout = nn.Linear(8 * len(model.regularizer.levels), latents.numel())
        parts["readout"] = nn.ModuleDict({"linear": readout})
        nn.init.normal_(readout.weight, std=0.3, generator=generator(config.seed, "readout"))
        nn.init.zeros_(readout.bias)
    named = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    named = {name: p for name, p in named.items() if p.requires_grad}
    matrices = {m.weight for part in parts.values() for m in part.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())] for name, p in named.items()}

    records, best, skipped = [], (math.inf, 0), 0
    start = tokens_of(averaged.eval(), config, val)[1] if config.model is None else None
    if repa:
        records.append({"step": 0, **constant_predictions(config, train, val, repa)})
    for step in range(total):
        config = configs.get(step, config)
        if repa and step >= config.repa_stop:
            repa, moments = None, {name: m for name, m in moments.items() if not name.startswith("repa")}

        # One step, on the whole global batch
        epoch, i = divmod(step, steps_per_epoch)
        order = torch.randperm(n_train, generator=generator(config.seed, "epoch", epoch)) if addressed else range(n_train)
        items = [int(index) for index in order[i * global_batch : (i + 1) * global_batch]]
        items = [(index, step, position) for position, index in enumerate(items)] if addressed else items
        losses = losses_of(model.train(), images_of(train, items), by_position(config.seed, step, len(items)), readout, repa)
        loss = losses["flow_loss"] + (repa_weight(config, step) * losses["repa_loss"] if repa else 0)
        if readout is not None and (config.readout_steps is None or step < config.readout_steps):
            loss = loss + config.readout_weight * losses["readout_loss"]
        loss = loss * math.nan if step == nan_step else loss
        gradients = torch.autograd.grad(loss, [named[name] for name in moments], allow_unused=True, materialize_grads=True)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        if math.isfinite(norm):
            for (name, (first, second, t)), g in zip(moments.items(), gradients):
                p, g = named[name].data, g * min(1.0, config.max_grad_norm / norm)
                base = getattr(config, {"repa_projector": "repa_lr"}.get(part := name.split(".")[0], f"{part}_lr"))
                lr = rate(config, base or config.learning_rate, step, total - 1)
                decay = config.weight_decay if config.decay_all or named[name] in matrices else 0.0
                if config.optimizer == "adam":
                    g = g + decay * p
                else:
                    p.mul_(1 - lr * decay)
                first.lerp_(g, 1 - config.betas[0])
                second.lerp_(g**2, 1 - config.betas[1])
                corrected = [m / (1 - beta ** (t + 1)) for m, beta in zip((first, second), config.betas)]
                p.sub_(lr * corrected[0] / (corrected[1].sqrt() + config.eps))
                moments[name][2] = t + 1
            if config.use_ema:
                decay = min(config.ema_decay, (1 + step) / (10 + step))
                for average, p in zip(averaged.parameters(), model.parameters()):
                    average.data.lerp_(p.data, 1 - decay)
        lr = rate(config, config.decoder_lr or config.learning_rate, step, total - 1)
        record = {"loss": loss, **losses, "lr": lr, "grad_norm": norm, "epoch": epoch, "skipped_steps": skipped}
        skipped += step == nan_step
        if config.use_repa:
            record["repa_weight"] = repa_weight(config, step)
        done = step + 1
        records.append({"step": done, **{f"train/{name}": float(torch.as_tensor(value).detach()) for name, value in record.items()}})

        # What follows it
        model.eval(), averaged.eval()
        due = done % steps_per_epoch == 0 or done == total or done % (config.val_every_steps or total) == 0
        last = done == total or done in configs
        if due or last:
            n = min(config.val_images or len(val), len(val))
            chosen = chosen_to_validate(n, len(val)) if addressed else range(n)
            aligns = repa if repa and done < config.repa_stop else None
            with torch.no_grad():
                losses = losses_of(averaged, images_of(val, chosen), by_position(0, VALIDATION_STEP, n), None, aligns)
            losses["loss"] = losses["flow_loss"] + (repa_weight(config, done) * losses["repa_loss"] if aligns else 0)
            metrics, tokens = tokens_of(averaged, config, val)
            metrics.update({f"val/{name}": value.item() for name, value in losses.items()})
            if start is not None:
                metrics["val/codes_kept"] = (tokens == start).float().mean().item()
            records.append({"step": done, **metrics})
            best = min(best, (metrics[config.best_metric], done)) if due else best
        if last or done % (config.visualize_every or total) == 0:
            n = min(config.num_psnr_images, len(val))
            measured = columns_of(averaged, config, val, spread(n, len(val)), config.psnr_guidance_scale)
            if config.guidance_scale == config.psnr_guidance_scale:
                picture = {title: c[spread(config.num_vis_images, n)] for title, c in measured.items()}
            else:
                shown = spread(config.num_vis_images, len(val))
                picture = columns_of(averaged, config, val, shown, config.guidance_scale)
            compared = {f"k{k}": measured[k] for k in sorted(config.vis_token_counts)}
            compared["mean_image"] = images_of(train, range(n_train)).mean(0, keepdim=True)
            errors = {k: (c - measured["original"]).square().flatten(1).mean(1) for k, c in compared.items()}
            psnrs = {f"val/psnr_{k}": (10 * torch.log10(4 / e)).mean().item() for k, e in errors.items()}
            records.append({"step": done, **psnrs})
    return records, {
        "model": dict(model.state_dict()), "averaged": dict(averaged.state_dict()), "moments": moments, "best": best,
        "beside": {k: p.data for k, p in named.items() if k.startswith(("repa", "readout"))},
        "picture": list(picture.values()),
    }  # fmt: skip
