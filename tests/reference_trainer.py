"""A second trainer, to check the first one by: a run in plain PyTorch, written from the READMEs and the papers.

Of the package it takes the model's modules, random draws by address and datasets, but nothing of train_flextok.py,
flextok/training (whose settings it reads) or the REPA loss. A step is one pass over its whole global batch. It knows
new and loaded pixel models with 4 pixels per latent, 2x2 latents per patch and 8 registers, in fp32 on the CPU.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from flextok.data.batch import chosen_to_validate, spread
from flextok.flow_matching.pipelines import AdaptiveProjectedGuidance
from flextok.utils.random import PICTURE_STEP, RANDOM_KEY, TOKENS_STEP, VALIDATION_STEP, BatchRandom, generator

N_REGISTERS = 8


def images_of(dataset, items) -> torch.Tensor:
    """[N, 3, H, W] of a dataset's items, by index or (index, step, position)."""
    items = [dataset[item] for item in items]
    return torch.stack([item["image"] if isinstance(item, dict) else item[0] for item in items])


def latents_of(images: torch.Tensor) -> torch.Tensor:
    return 0.5 * F.pixel_unshuffle(images, 4)


def draws_of(seed: int, step: int, n: int) -> BatchRandom:
    return BatchRandom(seed, step, torch.arange(n), n)


def shifted(t, shift: float):
    return shift * t / (1 + (shift - 1) * t)


def noise_levels(model, draws: BatchRandom) -> torch.Tensor:
    """Sigmas [N]: strata of the whole batch, logit-normal or SD3's mode sampling, shifted."""
    flow, u = model.flow_matching_noise_module, draws.uniform("sigma")
    if flow.stratisfied:
        u = (draws.positions + u) / draws.global_batch_size
    sigma = 1 - u - flow.mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    if flow.ln:
        sigma = torch.sigmoid(flow.ln_mean + flow.ln_std * torch.special.ndtri(u))
    return shifted(sigma, flow.shift).float()


def velocity_of(model, quants, x, sigma, **seen) -> torch.Tensor:
    data = dict(enc_registers_quant=quants, vae_latents_noised=x, timesteps=sigma, **seen)
    return model.decoder(data)["vae_latents_reconst"]


def flow_loss_of(model, quants, latents, noise, sigma, **seen) -> torch.Tensor:
    noised = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
    return (velocity_of(model, quants, noised, sigma, **seen) - (noise - latents)).square().mean()


@torch.no_grad()
def targets_of(images, repa) -> torch.Tensor:
    """The encoder's features on the target grid, [N, h, w, C]."""
    return F.interpolate(repa["encoder"](images), repa["size"], mode="bilinear").movedim(1, -1)


def losses_of(model, images, draws, readout=None, repa=None) -> dict[str, torch.Tensor]:
    """The losses of a batch; `repa`: the frozen encoder, the target's size, and the projectors by layer."""
    latents, kept, handles = latents_of(images), {}, []
    for layer in repa["projectors"] if repa else ():
        block = model.decoder.module_dict["dec_transformer"].blocks[layer]
        keep = lambda module, inputs, output, layer=layer: kept.update({layer: output})  # noqa: E731
        handles.append(block.register_forward_hook(keep))
    quants = model.regularizer(model.encoder({"vae_latents": latents, RANDOM_KEY: draws}))["enc_registers_quant"]
    seen = {RANDOM_KEY: draws} if model.training else {"eval_keep_k": draws.integers("keep_k", 1, N_REGISTERS)}
    noise = draws.normal("flow_noise", latents.shape[1:])
    losses = {"flow_loss": flow_loss_of(model, quants, latents, noise, noise_levels(model, draws), **seen)}
    for handle in handles:
        handle.remove()
    if readout is not None:
        counts = draws.integers("readout/keep_k", 1, N_REGISTERS).tolist()
        first = torch.stack([torch.cat([q[:k], torch.zeros_like(q[k:])]) for q, k in zip(quants, counts)])
        losses["readout_loss"] = (readout(first.flatten(1)) - latents.flatten(1)).square().mean()
    if repa:
        target, side = targets_of(images, repa), latents.shape[-1] // 2
        for layer, projector in repa["projectors"].items():  # patches come before registers
            features = kept[layer][:, : side**2].transpose(1, 2).unflatten(2, (side, side))
            features = F.interpolate(features, repa["size"], mode="bilinear").movedim(1, -1)
            losses[f"repa_loss_layer_{layer}"] = -F.cosine_similarity(projector(features), target, dim=-1).mean()
        losses["repa_loss"] = sum(losses[f"repa_loss_layer_{i}"] for i in repa["projectors"]) / len(repa["projectors"])
    return losses


def constant_predictions(config, train, val, repa) -> dict[str, float]:
    """REPA's loss of the best vector for each position, and of the best for all, fitted to training images."""
    indices = spread(config.repa_constant_images, len(train)), chosen_to_validate(config.val_images, len(val))
    units = [F.normalize(targets_of(images_of(data, i), repa), dim=-1) for data, i in zip((train, val), indices)]
    by_position = units[0].mean(0, keepdim=True)
    best = {"constant": by_position, "mean": by_position.mean((1, 2), keepdim=True)}
    return {
        f"{split}/repa_loss_{name}": -F.cosine_similarity(unit, vector, dim=-1).mean().item()
        for split, unit in zip(("train", "val"), units) for name, vector in best.items()
    }  # fmt: skip


@torch.no_grad()
def tokens_of(model, config, val) -> tuple[dict[str, float], torch.Tensor]:
    """How validation images use their tokens, and the tokens."""
    n = min(config.val_token_images, len(val))
    draws, latents = draws_of(0, TOKENS_STEP, n), latents_of(images_of(val, spread(n, len(val))))
    data = model.regularizer(model.encoder({"vae_latents": latents}))
    quants, noise, metrics = data["enc_registers_quant"], draws.normal("flow_noise", latents.shape[1:]), {}
    cases = {f"k{k}": (k, noise_levels(model, draws)) for k in (1, 4, 8)}
    cases |= {f"t{t}": (N_REGISTERS, torch.full((n,), t)) for t in (0.1, 0.3, 0.5, 0.7, 0.9)}
    for name, (k, sigma) in cases.items():
        loss = flow_loss_of(model, quants, latents, noise, sigma, eval_keep_k=[k] * n)
        metrics[f"val/flow_loss_{name}"] = loss.item()
    for position in (1, 2, 4):
        counts = data["tokens"][:, position - 1].unique(return_counts=True)[1]
        metrics[f"val/codes_distinct_{position}"] = len(counts) / n
        metrics[f"val/codes_entropy_{position}"] = -sum(c / n * math.log2(c / n) for c in counts.tolist())
    return metrics, data["tokens"]


@torch.no_grad()
def columns_of(model, config, val, indices, scale) -> dict[str, torch.Tensor]:
    """Columns of a picture: the VAE's images, those by number of tokens in guided Euler steps, the originals."""
    images, n, shift = images_of(val, indices), len(indices), model.flow_matching_noise_module.shift
    quants = model.regularizer(model.encoder({"vae_latents": latents_of(images)}))["enc_registers_quant"]
    columns = {"VAE": images}
    for k in sorted(config.vis_token_counts):
        x = draws_of(0, PICTURE_STEP, n).normal("picture", latents_of(images).shape[1:])
        apg = AdaptiveProjectedGuidance()
        for i in range(config.inference_steps, 0, -1):
            t, following = (shifted(j / config.inference_steps, shift) for j in (i, i - 1))
            seen, unseen = (
                velocity_of(model, quants, x, torch.full((n,), t), eval_keep_k=[k] * n, eval_dropout_mask=[null] * n)
                for null in (False, True)
            )
            guided = apg(seen, unseen, scale) if config.perform_norm_guidance else unseen + scale * (seen - unseen)
            x = x + (following - t) * guided
        columns[f"k{k}"] = (F.pixel_shuffle(x, 4) / 0.5).clamp(-1, 1)
    return {**columns, "original": images}


def repa_weight(config, step: int) -> float:
    weight = config.repa_weight * min(1.0, (step + 1) / config.repa_warmup_steps)
    left = max(0, config.repa_stop - step)
    if left < config.repa_cooldown_steps:
        weight *= (1 - math.cos(math.pi * left / config.repa_cooldown_steps)) / 2
    return weight


def rate(config, part: str, step: int, last: int) -> float:
    """The learning rate of a part of the model in a step, of 0 to `last`: warm-up, then wsd or cosine."""
    base = getattr(config, {"repa_projector": "repa_lr"}.get(part, f"{part}_lr")) or config.learning_rate
    if step < config.warmup_steps:
        return base * (step + 1) / config.warmup_steps
    if config.scheduler == "wsd":
        left = min(1.0, (last - step) / config.decay_steps)
    else:
        left = (1 + math.cos(math.pi * (step - config.warmup_steps) / (last - config.warmup_steps))) / 2
    return config.min_lr + (base - config.min_lr) * left


def reference_run(configs, model, train, val, addressed=True, encoder=None, nan_step=None) -> tuple[list, dict]:
    """The records of a run's metrics.jsonl, but for what depends on the clock, and the state that it ends with.

    Args:
        configs: TrainConfig by the step from which it is in force: {0: ..., 5: ...} stops after 5 and is resumed.
        model: Is trained in place.
        addressed: Images come shuffled by epoch and by (index, step, position), as from flextok.data; else in order.
        encoder: REPA's.
        nan_step: Step, from 0, whose loss becomes NaN.
    """
    config = configs[0]
    size = config.batch_size * config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(train) / size)
    total = config.num_epochs * steps_per_epoch
    averaged = copy.deepcopy(model) if config.use_ema else model

    # What is trained beside the model, under the trainer's names
    parts, repa = {"encoder": model.encoder, "decoder": model.decoder}, None
    if config.use_repa:
        dims = model.decoder.module_dict["dec_transformer"].dim, *[config.repa_projector_hidden] * 2, encoder.dim
        parts["repa_projector"] = nn.ModuleList()
        for i in range(len(config.repa_layers)):
            draws = generator(config.seed, "repa_projector", *([i] if i else []))
            layers = [nn.Linear(*pair) for pair in zip(dims, dims[1:])]
            for linear in layers:
                nn.init.xavier_uniform_(linear.weight, generator=draws)
                nn.init.zeros_(linear.bias)
            layers = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])
            parts["repa_projector"].append(nn.ModuleDict({"layers": layers}))
        projectors = {i: projector["layers"] for i, projector in zip(config.repa_layers, parts["repa_projector"])}
        repa = {"encoder": encoder, "size": config.repa_target_size, "projectors": projectors}
    n_latents = latents_of(images_of(train, [0])).numel()
    readout = nn.Linear(N_REGISTERS * len(model.regularizer.levels), n_latents)
    nn.init.normal_(readout.weight, std=0.3, generator=generator(config.seed, "readout"))
    nn.init.zeros_(readout.bias)
    parts["readout"] = nn.ModuleDict({"linear": readout})
    named = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    named = {name: p for name, p in named.items() if p.requires_grad}
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p), torch.tensor(0.0)] for name, p in named.items()}
    matrices = {m.weight for part in parts.values() for m in part.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}

    records, best = [], (math.inf, 0)
    start = tokens_of(averaged.eval(), config, val)[1] if config.model is None else None
    if repa:
        records.append({"step": 0, **constant_predictions(config, train, val, repa)})
    for step in range(total):
        config = configs.get(step, config)
        if repa and step >= config.repa_stop:
            repa, moments = None, {name: m for name, m in moments.items() if not name.startswith("repa")}

        # Losses and gradients
        epoch, i = divmod(step, steps_per_epoch)
        items = range(len(train))
        if addressed:
            order = torch.randperm(len(train), generator=generator(config.seed, "epoch", epoch)).tolist()
            items = [(index, step, i % size) for i, index in enumerate(order)]
        images = images_of(train, items[i * size : (i + 1) * size])
        losses = losses_of(model.train(), images, draws_of(config.seed, step, len(images)), readout, repa)
        loss = losses["flow_loss"] + (repa_weight(config, step) * losses["repa_loss"] if repa else 0)
        if step < (config.readout_steps or total):
            loss = loss + config.readout_weight * losses["readout_loss"]
        loss = loss * math.nan if step == nan_step else loss
        gradients = torch.autograd.grad(loss, [named[name] for name in moments], materialize_grads=True)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))

        # Clipped AdamW or Adam, and averages
        rates = {part: rate(config, part, step, total - 1) for part in parts}
        for (name, (first, second, t)), g in zip(moments.items() if math.isfinite(norm) else (), gradients):
            p, lr, g = named[name].data, rates[name.split(".")[0]], g * min(1.0, config.max_grad_norm / norm)
            decay = config.weight_decay if config.decay_all or named[name] in matrices else 0.0
            if config.optimizer == "adam":
                g = g + decay * p
            else:
                p.mul_(1 - lr * decay)
            first.lerp_(g, 1 - config.betas[0])
            second.lerp_(g**2, 1 - config.betas[1])
            t += 1
            mean, square = (m / (1 - beta**t) for m, beta in zip((first, second), config.betas))
            p.sub_(lr * mean / (square.sqrt() + config.eps))
        if config.use_ema and math.isfinite(norm):
            for average, p in zip(averaged.parameters(), model.parameters()):
                average.data.lerp_(p.data, 1 - min(config.ema_decay, (1 + step) / (10 + step)))
        record = {"loss": loss, **losses, "lr": rates["decoder"], "grad_norm": norm, "epoch": epoch}
        record["skipped_steps"] = nan_step is not None and step > nan_step  # told a step later
        if config.use_repa:
            record["repa_weight"] = repa_weight(config, step)
        done = step + 1
        records.append({"step": done, **{f"train/{k}": float(torch.as_tensor(v).detach()) for k, v in record.items()}})

        # Validation and pictures
        model.eval(), averaged.eval()
        due = done % steps_per_epoch == 0 or done == total or done % (config.val_every_steps or total) == 0
        ends = done == total or done in configs
        if due or ends:
            n = config.val_images or len(val)
            images = images_of(val, chosen_to_validate(n, len(val)) if addressed else range(n))
            aligned = repa if repa and done < config.repa_stop else None
            with torch.no_grad():
                losses = losses_of(averaged, images, draws_of(0, VALIDATION_STEP, n), None, aligned)
            losses["loss"] = losses["flow_loss"] + (repa_weight(config, done) * losses["repa_loss"] if aligned else 0)
            metrics, tokens = tokens_of(averaged, config, val)
            metrics |= {f"val/{name}": value.item() for name, value in losses.items()}
            if start is not None:
                metrics["val/codes_kept"] = (tokens == start).float().mean().item()
            records.append({"step": done, **metrics})
            best = min(best, (metrics.get(config.best_metric, math.inf), done)) if due else best
        if ends or done % (config.visualize_every or total) == 0:
            n, pictured = min(config.num_psnr_images, len(val)), config.num_vis_images
            measured = columns_of(averaged, config, val, spread(n, len(val)), config.psnr_guidance_scale)
            picture = {title: column[spread(pictured, n)] for title, column in measured.items()}
            if config.guidance_scale != config.psnr_guidance_scale:
                picture = columns_of(averaged, config, val, spread(pictured, len(val)), config.guidance_scale)
            mean_image = images_of(train, range(len(train))).mean(0, keepdim=True)
            for title, column in {**measured, "mean_image": mean_image}.items():
                errors = (column - measured["original"]).square().mean((1, 2, 3))
                if title not in ("VAE", "original"):
                    records.append({"step": done, f"val/psnr_{title}": (10 * torch.log10(4 / errors)).mean().item()})
    return records, {
        "model": dict(model.state_dict()), "averaged": dict(averaged.state_dict()), "moments": moments, "best": best,
        "beside": {name: p.data for name, p in named.items() if name.startswith(("repa", "readout"))},
        "picture": list(picture.values()),
    }  # fmt: skip
