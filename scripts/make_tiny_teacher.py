"""Makes tiny teachers: two-expert Wan2.2 pipelines of a few MB, trained on a tiny world.

The first of the family is the embedded teacher. All its parts are trained, from the tokenizer to
both experts, in less than an hour on two CPU cores. The others differ from it in width, depth, clip
and content; where they show the same shapes they take over its text encoder and VAE. One is given
the first frame too, one learns clips of two lengths, one larger ones, one shows two shapes: what
they train begins as the embedded teacher's.
Each stage writes its result to --work_dir, and a stage with a result is skipped; experts also keep
their state while they train. To resume, run the same command again.

    python scripts/make_tiny_teacher.py                  # train missing stages, write and check
    python scripts/make_tiny_teacher.py --member wide    # another of the family
    python scripts/make_tiny_teacher.py --member tiny_i2v    # the one that is given a picture
    python scripts/make_tiny_teacher.py --member tiny_pairs  # the one that shows two shapes
    python scripts/make_tiny_teacher.py --check          # only check what is there
"""

import argparse
import io
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BatchEncoding, T5TokenizerFast, UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from wan_distill.maths.first_frames import distance_from
from wan_distill.maths.tiny_judge import Judge
from wan_distill.maths.tiny_world import COLOURS, DIRECTIONS, SHAPES, SIZES, Scene, World

ASSETS = Path(__file__).resolve().parent.parent / "assets"
WORK = Path(".work")
TEXT_LENGTH = 16  # tokens; the longest caption has 12
TEXT_DIM = 64
LATENT_CHANNELS = 16
SAMPLING_STEPS = 40  # of Wan2.2, from text and from pictures
SNAPSHOT_STEPS = 100  # of an expert's training, after which its state is kept
PICTURES_OF_EACH = 4  # per caption, in the folder of a teacher that is given pictures

# With some ordinary English, words outside the captions become pieces rather than bytes.
ENGLISH = (
    "The quick brown fox jumps over the lazy dog while a white horse walks slowly through the tall "
    "grass near the river.",
    "In the morning light, two people stand on the beach and look at the waves; the camera follows "
    "them from behind.",
    "A woman with long dark hair is smiling, holding a cup of coffee, and talking with her friend "
    "in a quiet city street.",
    "Snow falls on the mountains at night. A large ship sails across the ocean under a cloudy sky, "
    "slow motion, 4k video.",
    "An orange cat, a pink bird, a purple flower, a black car and a grey house stand still, then "
    "turn round and fly away.",
    "Bright colours, overexposed, static, blurred details, subtitles, worst quality, low quality, "
    "ugly, extra fingers.",
)


@dataclass(frozen=True)
class Sampling:
    """How a model of Wan2.2 samples: `boundary` is the sigma at which it changes experts."""

    boundary: float
    shift: float
    guidance: dict[str, float]


FROM_TEXT = Sampling(0.875, 12.0, {"transformer": 4.0, "transformer_2": 3.0})  # T2V-A14B
FROM_PICTURES = Sampling(0.900, 5.0, {"transformer": 3.5, "transformer_2": 3.5})  # I2V-A14B


@dataclass(frozen=True)
class Member:
    """One teacher of the family."""

    world: World
    heads: int = 4
    layers: int = 3
    head_width: int = 32
    steps: int = 3000
    """Training steps of each expert."""
    borrowed: tuple[str, ...] = ()
    """Parts that are the embedded teacher's."""
    clips: int = 4800
    """That an expert learns from."""
    pictures: bool = False
    """Whether it is given the first frame."""
    shorter: int | None = None
    """Frames, 4k+1, to which every other clip that an expert learns from is cut."""
    goes_on: bool = False
    """Whether what is trained begins as the embedded teacher's, and learns something more."""

    @property
    def width(self) -> int:
        return self.head_width * self.heads

    @property
    def peak_lr(self) -> float:
        return 1.5e-3 * (128 / self.width) ** 0.5

    @property
    def sampling(self) -> Sampling:
        return FROM_PICTURES if self.pictures else FROM_TEXT


SAME_SHAPES = ("tokenizer", "text_encoder", "vae")
EMBEDDED = "tiny_wan22"
SHORT = World(9, 32, 32, 0.75)  # 12 tokens a clip; at half the scale the VAE loses small shapes
FAMILY = {
    EMBEDDED: Member(World()),
    "tiny_i2v": Member(
        World(), steps=900, borrowed=SAME_SHAPES, clips=1920, pictures=True, goes_on=True
    ),
    "tiny_pairs": Member(
        World(pairs=True), steps=15000, borrowed=("tokenizer", "vae"), clips=3600, goes_on=True
    ),
    "wide": Member(World(9, 48, 48, 0.75), heads=8, borrowed=SAME_SHAPES),
    "broad": Member(SHORT, heads=8, borrowed=SAME_SHAPES),
    "wider": Member(SHORT, heads=16, layers=2, borrowed=SAME_SHAPES),
    # 180 tokens a clip.
    "tall": Member(
        World(17, 96, 96, 1.5), steps=900, borrowed=SAME_SHAPES, clips=1920, goes_on=True
    ),
    # Two that are trained for two fifths of the time: their guided paths are rough.
    "narrow": Member(SHORT, heads=2, steps=1200, borrowed=SAME_SHAPES),
    "rough": Member(SHORT, 5, layers=4, head_width=24, steps=1200, borrowed=SAME_SHAPES),
    # The only one that holds at two lengths.
    "lengths": Member(
        World(), steps=900, borrowed=SAME_SHAPES, clips=1920, shorter=9, goes_on=True
    ),
}
Stage = Callable[[Path, Path, int, Member], None]


# ----------------------------------------------------------------------- tokenizer and text encoder


def make_tokenizer(folder: Path, work: Path, seed: int, member: Member) -> None:
    """A unigram sentencepiece model with UMT5's special ids, as spiece.model and tokenizer.json."""
    lines = [*member.world.training_captions, *ENGLISH]
    # The trainer makes a piece only of what occurs in two distinct words: "red" and "red," make
    # "red" a piece.
    lines += [line.replace(" ", ", ") + "," for line in lines]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=512,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    T5TokenizerFast.from_pretrained(folder, extra_ids=0).save_pretrained(folder)

    # transformers 5 drops the byte fallback and writes a config that 4.57 cannot read.
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["byte_fallback"] = True
    write_json(folder / "tokenizer.json", tokenizer)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "extra_ids": 0,
        "model_max_length": 512,
        **special,
    }
    write_json(folder / "tokenizer_config.json", config)


def new_text_encoder(member: Member, tokens: int) -> UMT5EncoderModel:
    """An untrained one or, where it goes on, the embedded teacher's."""
    if member.goes_on:
        return load_text_encoder(ASSETS / EMBEDDED)
    config = UMT5Config(
        vocab_size=tokens,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config)


def load_text_encoder(folder: Path) -> UMT5EncoderModel:
    """The one below `folder`. With tie_word_embeddings=True every version of transformers loads
    its table.
    """
    return UMT5EncoderModel.from_pretrained(folder / "text_encoder", tie_word_embeddings=True)


def make_text_encoder(folder: Path, work: Path, seed: int, member: Member) -> None:
    """A UMT5 encoder, trained to predict each token and, from the mean state, each attribute."""
    tokenizer = T5TokenizerFast.from_pretrained(work / "tokenizer")
    encoder = new_text_encoder(member, len(tokenizer))
    vocabularies = [list(SIZES), list(COLOURS), list(SHAPES), list(DIRECTIONS)]
    captions = member.world.training_captions
    words = [(*scene[:4], *(scene.still or ())[1:]) for scene in map(Scene.parse, captions)]
    if member.world.pairs:
        vocabularies.append(list(SHAPES))
    answers = torch.tensor(
        [[v.index(word) for v, word in zip(vocabularies, w, strict=True)] for w in words]
    )
    attribute_heads = nn.ModuleList(nn.Linear(TEXT_DIM, len(v)) for v in vocabularies)
    token_head = nn.Linear(TEXT_DIM, len(tokenizer))
    tokens = tokenize(tokenizer, captions)
    real = tokens.attention_mask.bool()

    def loss() -> Tensor:
        # A masked word can only be predicted from its neighbours.
        masked = real & (torch.rand(real.shape) < 0.1)
        ids = tokens.input_ids.masked_fill(masked, tokenizer.unk_token_id)
        states = encoder(ids, tokens.attention_mask).last_hidden_state
        mean = (states * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
        total = torch.zeros(())
        for head, answer in zip(attribute_heads, answers.T, strict=True):
            total = total + F.cross_entropy(head(mean), answer)
        return total + F.cross_entropy(token_head(states[real]), tokens.input_ids[real])

    parameters = [*encoder.parameters(), *attribute_heads.parameters(), *token_head.parameters()]
    peak_lr = 5e-4 if member.goes_on else 2e-3
    train("text_encoder", parameters, loss, steps=1500, peak_lr=peak_lr)
    save_text_encoder(encoder, folder)


def save_text_encoder(encoder: UMT5EncoderModel, folder: Path) -> None:
    """Writes the files as the hosted Wan2.2 has them: in shards, the table as `shared.weight` only.

    With the hosted config, `tie_word_embeddings: false`, some versions of transformers lose the
    table, and the product's tests must catch that. `save_pretrained` would write `true`.
    """
    config = encoder.config.to_dict() | {
        "tie_word_embeddings": False,
        "architectures": ["UMT5EncoderModel"],
    }
    config.pop("_name_or_path", None)  # where what it began with was loaded from
    write_json(folder / "config.json", config)
    weights = {
        k: v.contiguous()
        for k, v in encoder.state_dict().items()
        if k != "encoder.embed_tokens.weight"
    }
    names = sorted(weights, key=lambda name: (name != "shared.weight", name))
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weights[name] for name in shard}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": weight_map},
    )


def tokenize(tokenizer: T5TokenizerFast, prompts: list[str]) -> BatchEncoding:
    """`input_ids` and `attention_mask`, [B, TEXT_LENGTH] each, as WanPipeline makes them."""
    return tokenizer(
        prompts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    )


@torch.no_grad()
def encode_prompts(work: Path, prompts: list[str]) -> Tensor:
    """Embeddings [B, TEXT_LENGTH, TEXT_DIM], zero after each prompt, as WanPipeline makes them."""
    encoder = load_text_encoder(work)
    tokens = tokenize(T5TokenizerFast.from_pretrained(work / "tokenizer"), prompts)
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states * tokens.attention_mask[..., None]


# ---------------------------------------------------------------------------------- VAE and latents


def make_vae(folder: Path, work: Path, seed: int, member: Member) -> None:
    """Wan's causal video VAE: trained on images, then on small crops, then on whole clips.

    For speed it works on 2 x 2 patches, as the VAE of Wan2.2-5B does.
    """
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
    )
    start_linear(vae)
    world, rng = member.world, torch.Generator().manual_seed(seed)

    def reconstruction(batch: int, frames: int, side: int) -> Tensor:
        known = world.training_captions
        captions = [known[i] for i in torch.randint(len(known), (batch,), generator=rng)]
        room = torch.tensor([world.frames - frames, world.height - side, world.width - side])
        t, y, x = (torch.rand(3, generator=rng) * (room + 1)).int().tolist()
        clips = world.render(captions, rng)[:, :, t : t + frames, y : y + side, x : x + side]
        posterior = vae.encode(clips).latent_dist
        error = (vae.decode(posterior.sample()).sample - clips).abs()
        # The shape covers only a few percent of the frame; its saturation gives it weight, since
        # the background is grey.
        weight = 1 + 2 * (clips.amax(dim=1, keepdim=True) - clips.amin(dim=1, keepdim=True))
        divergence = (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2
        return (weight * (error + 2 * error**2)).mean() + 1e-4 * divergence

    train(
        "vae, images",
        vae.parameters(),
        lambda: reconstruction(16, 1, 64),
        steps=400,
        peak_lr=1.5e-3,
    )
    train(
        "vae, crops", vae.parameters(), lambda: reconstruction(16, 5, 32), steps=500, peak_lr=1.5e-3
    )
    train(
        "vae, half clips",
        vae.parameters(),
        lambda: reconstruction(4, 9, 64),
        steps=300,
        peak_lr=1e-3,
    )
    # The cached features are steady only after three chunks: after training on 9 frames, the
    # colours of the last 8 drift.
    train(
        "vae, clips", vae.parameters(), lambda: reconstruction(3, 17, 64), steps=300, peak_lr=8e-4
    )
    vae.save_pretrained(folder)


@torch.no_grad()
def start_linear(vae: AutoencoderKLWan) -> None:
    """Initialises the VAE as a nearly linear, nearly noiseless autoencoder.

    Training then needs a tenth of the steps. With the default initialisation every convolution
    shrinks its input by sqrt(3), and the unit noise of the posterior hides the little of the clip
    that reaches the latents.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if name.endswith((".conv2", ".proj")):  # the last layer of every residual branch
            nn.init.zeros_(module.weight)
    vae.quant_conv.bias[vae.config.z_dim :] = -4.0  # log variance


@torch.no_grad()
def make_latents(folder: Path, work: Path, seed: int, member: Member) -> None:
    """Encodes the training clips; saves them normalised, and their statistics in the VAE's config.

    Writes latents.pt: [captions, clips of each, C, F, H, W], in the order of the captions. C is 16,
    or 36 where the teacher is given pictures: latents, mask, latents of the picture. The latter are
    normalised with the statistics of the VAE that is borrowed, as the pipeline does it.
    """
    vae = AutoencoderKLWan.from_pretrained(work / "vae")
    rng = torch.Generator().manual_seed(seed)
    captions = member.world.training_captions
    each = member.clips // len(captions)
    parts = work / "latents.parts"  # those of each caption: what is there is not made again
    parts.mkdir(exist_ok=True)
    groups = []
    for i, caption in enumerate(tqdm(captions, "latents, captions")):
        clips = member.world.render([caption] * each, rng)
        if not (file := parts / f"{i}.pt").exists():
            group = vae.encode(clips).latent_dist.mean
            if member.pictures:
                mean, std = statistics_of(vae)
                group = torch.cat([(group - mean) / std, picture_channels(vae, clips)], dim=1)
            torch.save(group, partial := file.with_suffix(".partial"))
            partial.replace(file)
        groups.append(torch.load(file))
    latents = torch.stack(groups)
    if member.pictures:
        torch.save(latents, folder / "latents.pt")
        return
    std, mean = torch.std_mean(latents, dim=(0, 1, 3, 4, 5), keepdim=True)
    vae.register_to_config(latents_mean=mean.flatten().tolist(), latents_std=std.flatten().tolist())
    vae.save_config(work / "vae")
    forget_place(work / "vae" / "config.json")
    torch.save((latents - mean) / std, folder / "latents.pt")


def statistics_of(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, [1, 16, 1, 1, 1] each."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def picture_channels(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """What WanImageToVideoPipeline puts beside the noisy latents: [B, 4 + 16, F, H, W].

    A mask that is 1 in the first latent frame, one channel for each of the 4 frames that a latent
    frame stands for; then the normalised latents of a clip that goes on in grey.

    Args:
        clips: [B, 3, frames, height, width] in [-1, 1], of which the first frames are used.
    """
    given = torch.zeros_like(clips)
    given[:, :, 0] = clips[:, :, 0]
    mean, std = statistics_of(vae)
    latents = (vae.encode(given).latent_dist.mean - mean) / std
    mask = torch.zeros_like(latents[:, : vae.config.scale_factor_temporal])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)


# ---------------------------------------------------------------------------------------- denoisers


def latent_frames(frames: int) -> int:
    """The first frame has a latent frame of its own, each 4 that follow share one."""
    return (frames - 1) // 4 + 1


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Wan's time shift of levels `u` in [0, 1], towards 1."""
    return shift * u / (1 + (shift - 1) * u)


def new_denoiser(member: Member, part: str) -> WanTransformer3DModel:
    """An untrained expert or, where it goes on, the embedded teacher's, new inputs with weight 0.

    Args:
        part: `transformer` or `transformer_2`.
    """
    denoiser = WanTransformer3DModel(
        num_attention_heads=member.heads,
        attention_head_dim=member.head_width,
        in_channels=LATENT_CHANNELS + (4 + LATENT_CHANNELS if member.pictures else 0),
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=2 * member.width,
        num_layers=member.layers,
        rope_max_seq_len=64,
    )
    if member.goes_on:
        weights = WanTransformer3DModel.from_pretrained(ASSETS / EMBEDDED / part).state_dict()
        name = "patch_embedding.weight"
        weights[name] = torch.cat(
            [weights[name], torch.zeros_like(denoiser.state_dict()[name][:, LATENT_CHANNELS:])],
            dim=1,
        )
        denoiser.load_state_dict(weights)
    return denoiser


def make_expert(
    folder: Path, work: Path, seed: int, member: Member, low: float, high: float, shift: float
) -> None:
    """Trains one expert by flow matching, velocity = noise - x0, at sigmas in [low, high].

    A larger `shift` draws more sigmas near 1.
    """
    denoiser = new_denoiser(member, folder.stem)
    latents = torch.load(work / "latents" / "latents.pt")
    prompts = encode_prompts(work, member.world.training_captions)
    no_prompt = encode_prompts(work, [""])
    # Sigmas in [low, high] are the shifted values of u in [u_low, u_high].
    u_low, u_high = (sigma / (shift - (shift - 1) * sigma) for sigma in (low, high))

    def loss(batch: int = 32) -> Tensor:
        caption = torch.randint(len(latents), (batch,))
        clip = torch.randint(latents.shape[1], (batch,))
        x0, given = latents[caption, clip].tensor_split((LATENT_CHANNELS,), dim=1)
        if member.shorter and torch.rand(()) < 0.5:
            # The VAE is causal: the first frames alone have these very latents.
            x0, given = (z[:, :, : latent_frames(member.shorter)] for z in (x0, given))
        noise = torch.randn_like(x0)
        # Stratified, so that every batch covers the whole range.
        u = (torch.arange(batch) + torch.rand(batch)) / batch
        sigma = shift_sigma(u_low + (u_high - u_low) * u, shift)
        x = torch.lerp(x0, noise, sigma[:, None, None, None, None])
        dropped = torch.rand(batch, 1, 1) < 0.1
        prompt = torch.where(dropped, no_prompt, prompts[caption])
        x = torch.cat([x, given], dim=1)
        velocity = denoiser(x, 1000 * sigma, prompt, return_dict=False)[0]
        return F.mse_loss(velocity, noise - x0)

    snapshot = work / f"{folder.stem}.training.pt"
    train(folder.stem, denoiser.parameters(), loss, member.steps, member.peak_lr, snapshot)
    denoiser.save_pretrained(folder)


def make_high_expert(folder: Path, work: Path, seed: int, member: Member) -> None:
    """The expert that decides the shapes' places and motion."""
    sampling = member.sampling
    make_expert(folder, work, seed, member, sampling.boundary, 1.0, sampling.shift)


def make_low_expert(folder: Path, work: Path, seed: int, member: Member) -> None:
    """The expert that draws them.

    Its shift is never that of sampling from text, so that the last, large step stays sharp.
    """
    make_expert(folder, work, seed, member, 0.0, member.sampling.boundary, shift=5.0)


# ----------------------------------------------------------------------------------------- training


def train(
    name: str,
    parameters: Iterable[Tensor],
    loss: Callable[[], Tensor],
    steps: int,
    peak_lr: float,
    snapshot: Path | None = None,
) -> None:
    """AdamW with warm-up and cosine decay; leaves the exponential average in the parameters.

    Args:
        snapshot: where the state is kept every SNAPSHOT_STEPS steps, so that training which was
            stopped goes on as if it had not been.
    """
    parameters = list(parameters)
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01)
    recent_loss, first = 0.0, 0
    if snapshot is not None and snapshot.exists():
        state = torch.load(snapshot)
        first, recent_loss = state["step"], state["loss"]
        for held, kept in zip([*parameters, *average], state["tensors"], strict=True):
            held.data.copy_(kept)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    bar = tqdm(range(first, steps), name, mininterval=2, initial=first, total=steps)
    for step in bar:
        if snapshot is not None and step > first and step % SNAPSHOT_STEPS == 0:
            state = dict(step=step, loss=recent_loss, tensors=[*parameters, *average])
            state |= dict(optimizer=optimizer.state_dict(), rng=torch.get_rng_state())
            torch.save(state, partial := snapshot.with_suffix(".partial"))
            partial.replace(snapshot)
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = peak_lr * cosine * min(1, (step + 1) / 100)
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))  # small at first: forgets the random start
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        recent_loss += (value.item() - recent_loss) / min(step + 1, 50)
        bar.set_postfix(loss=f"{recent_loss:.4f}", refresh=False)
    for parameter, mean in zip(parameters, average, strict=True):
        parameter.data.copy_(mean)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def forget_place(config: Path) -> None:
    """Removes from a part's configuration the folder that it was loaded from."""
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    write_json(config, content)


STAGES: dict[str, Stage] = {
    "tokenizer": make_tokenizer,
    "text_encoder": make_text_encoder,
    "vae": make_vae,
    "latents": make_latents,
    "transformer": make_high_expert,
    "transformer_2": make_low_expert,
}
EXPERTS = ("transformer", "transformer_2")


def run_stage(name: str, work: Path, seed: int, member: Member) -> None:
    """Makes the folder `work/name` unless it exists.

    It gets its name only when complete, so a stage that was stopped begins again.
    """
    if (work / name).exists():
        return
    partial = work / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if name in member.borrowed:
        shutil.copytree(ASSETS / EMBEDDED / name, partial)
    else:
        partial.mkdir(parents=True)
        torch.manual_seed(seed)
        STAGES[name](partial, work, seed, member)
    partial.rename(work / name)


def assemble(work: Path, folder: Path, member: Member) -> None:
    """Writes the whole pipeline, laid out as the hosted Wan2.2-T2V-A14B-Diffusers is."""
    shutil.rmtree(folder, ignore_errors=True)
    transformer, transformer_2 = (
        WanTransformer3DModel.from_pretrained(work / name) for name in EXPERTS
    )
    kind = WanImageToVideoPipeline if member.pictures else WanPipeline
    pipeline = kind(
        tokenizer=T5TokenizerFast.from_pretrained(work / "tokenizer"),
        text_encoder=load_text_encoder(work),
        vae=AutoencoderKLWan.from_pretrained(work / "vae"),
        transformer=transformer,
        transformer_2=transformer_2,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=1000,
            flow_shift=member.sampling.shift if member.pictures else 3.0,  # hosted T2V-A14B: 3
        ),
        boundary_ratio=member.sampling.boundary,
    )
    if member.goes_on:  # as Wan2.2's are: those in assets/ take half of the room
        transformer.to(torch.bfloat16)
        transformer_2.to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    # save_pretrained changes the form of these files.
    for name in {"tokenizer", "text_encoder", *member.borrowed}:
        shutil.rmtree(folder / name)
        shutil.copytree(work / name, folder / name)
    for name in EXPERTS:
        forget_place(folder / name / "config.json")
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "T5TokenizerFast"]
    write_json(folder / "model_index.json", index)
    write_json(folder / "world.json", asdict(member.world))
    world = member.world
    (folder / "prompts.txt").write_text("\n".join(world.training_captions) + "\n")
    (folder / "heldout_prompts.txt").write_text("\n".join(world.heldout_captions) + "\n")
    if member.pictures:
        write_pictures(folder / "pictures", world, world.training_captions, seed=1)
        write_pictures(folder / "heldout_pictures", world, world.heldout_captions, seed=2)


def write_pictures(folder: Path, world: World, captions: list[str], seed: int) -> None:
    """First frames of random clips, PICTURES_OF_EACH per caption, as `datasets` calls a folder of
    images: PNG files and metadata.jsonl. All captions come once before any comes again.
    """
    folder.mkdir()
    wanted = captions * PICTURES_OF_EACH
    clips = world.render(wanted, torch.Generator().manual_seed(seed))
    lines = []
    for i, (caption, clip) in enumerate(zip(wanted, clips, strict=True)):
        pixels = ((clip[:, 0].permute(1, 2, 0) + 1) * 127.5).round().byte()
        Image.fromarray(pixels.numpy()).save(folder / f"{i:04d}.png", optimize=True)
        lines.append(json.dumps({"file_name": f"{i:04d}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


# -------------------------------------------------------------------------------------------- check


@torch.no_grad()
def sample(
    pipeline: WanPipeline | WanImageToVideoPipeline,
    member: Member,
    captions: list[str],
    rng: torch.Generator,
    pictures: Tensor | None = None,
) -> Tensor:
    """Clips [B, 3, F, H, W] in [-1, 1], by the guided Euler steps of the distillation's teacher.

    Args:
        pictures: the first frames, [B, 3, H, W] in [-1, 1]; the unguided branch has them too.
    """
    world, sampling = member.world, member.sampling
    prompt, no_prompt = pipeline.encode_prompt(captions, "", max_sequence_length=TEXT_LENGTH)
    shape = (16, latent_frames(world.frames), world.height // 8, world.width // 8)
    x = torch.randn(len(captions), *shape, generator=rng)
    given = x[:, :0]
    if pictures is not None:  # the stock pipeline's, which takes one picture at a time
        size = dict(height=world.height, width=world.width, num_frames=world.frames)
        given = torch.cat(
            [
                pipeline.prepare_latents(picture[None], 1, **size, dtype=x.dtype, device="cpu")[1]
                for picture in pictures
            ]
        )
    sigmas = shift_sigma(torch.linspace(1, 0, SAMPLING_STEPS + 1), sampling.shift)
    for sigma, lower in itertools.pairwise(sigmas):
        expert = EXPERTS[0] if sigma >= sampling.boundary else EXPERTS[1]
        denoiser = getattr(pipeline, expert)
        timestep = (1000 * sigma).expand(len(x))
        model_input = torch.cat([x, given], dim=1)
        conditional = denoiser(model_input, timestep, prompt, return_dict=False)[0]
        unconditional = denoiser(model_input, timestep, no_prompt, return_dict=False)[0]
        velocity = torch.lerp(unconditional, conditional, sampling.guidance[expert])
        x = x + (lower - sigma) * velocity
    mean, std = statistics_of(pipeline.vae)
    return pipeline.vae.decode(x * std + mean).sample


def check(folder: Path, count: int, seed: int, sheet: Path | None, member: Member) -> None:
    """Prints which share of clips obeys its caption, for training and for held-out captions, and
    what the VAE allows; of a teacher that is given pictures how well the first frames are kept.

    Args:
        sheet: saves some frames as a PNG here, behind the pictures if there are any.
    """
    world = member.world
    kind = WanImageToVideoPipeline if member.pictures else WanPipeline
    pipeline = kind.from_pretrained(folder)
    rng = torch.Generator().manual_seed(seed)
    rows = []
    groups = {"training": world.training_captions, "held-out": world.heldout_captions}
    for group, captions in groups.items():
        wanted = [
            captions[i % len(captions)]
            for i in torch.randperm(max(count // 2, 1), generator=rng).tolist()
        ]
        rendered = world.render(wanted, rng if member.pictures else torch.Generator())
        pictures = rendered[:, :, 0] if member.pictures else None
        clips = torch.cat(
            [
                sample(
                    pipeline,
                    member,
                    wanted[i : i + 20],
                    rng,
                    None if pictures is None else pictures[i : i + 20],
                )
                for i in tqdm(range(0, len(wanted), 20), f"{group} captions")
            ]
        )
        good, most = (obeying(world, c, wanted) for c in (clips, kept(pipeline.vae, rendered)))
        print(
            f"{group}: {good} of {len(clips)} clips obey their caption ({good / len(clips):.1%}); "
            f"of rendered ones that the VAE alone encodes and decodes, {most}"
        )
        strips = [torch.cat(list(clip[:, ::4].unbind(1)), dim=2) for clip in clips[:8]]
        if pictures is not None:
            print_first_frames(group, pipeline.vae, clips, pictures)
            strips = [torch.cat(pair, dim=2) for pair in zip(pictures[:8], strips, strict=True)]
        rows += strips
    if sheet:
        image = ((torch.cat(rows, dim=1).permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).byte()
        Image.fromarray(image.numpy()).save(sheet)


def obeying(world: World, clips: Tensor, captions: list[str]) -> int:
    """How many of the clips [B, 3, F, H, W] in [-1, 1] obey their captions."""
    judge = Judge(world)
    return sum(judge.obeys(clip, text) for clip, text in zip(clips, captions, strict=True))


@torch.no_grad()
def kept(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """What the VAE alone keeps of clips [B, 3, F, H, W] in [-1, 1]: no denoiser can show more."""
    parts = [vae.decode(vae.encode(part).latent_dist.mean).sample for part in clips.split(20)]
    return torch.cat(parts)


@torch.no_grad()
def print_first_frames(group: str, vae: AutoencoderKLWan, clips: Tensor, pictures: Tensor) -> None:
    """Prints the error of the first frames, beside what the VAE alone makes of the pictures.

    Args:
        clips: [B, 3, F, H, W] in [-1, 1].
        pictures: [B, 3, H, W] in [-1, 1].
    """
    given = pictures[:, :, None]
    shown, first, alone = (
        ((frames.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1)
        for frames in (given, clips[:, :, :1], kept(vae, given))
    )
    error, floor = distance_from(first, shown[:, 0]), distance_from(alone, shown[:, 0])
    print(
        f"{group}: frame 1 differs from the picture by {error.mean():.4f} (largest "
        f"{error.max():.4f}; encoded and decoded by the VAE alone: {floor.mean():.4f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--member", choices=FAMILY, default=EMBEDDED, help="of the family (%(default)s)"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="the pipeline's folder (embedded teachers: in assets/; others: below .work/family)",
    )
    parser.add_argument("--work_dir", type=Path, help="finished stages (default: .work/<member>)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of every stage and of the check (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, help="training steps of each expert (default: the member's)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="CPU threads (%(default)s); 1 is best on a busy machine",
    )
    parser.add_argument(
        "--stage",
        choices=STAGES,
        help="make only this stage; two experts can then be trained at the same time",
    )
    parser.add_argument(
        "--check", action="store_true", help="only check the pipeline in --output_dir"
    )
    parser.add_argument(
        "--check_clips", type=int, default=200, help="half are of held-out captions (%(default)s)"
    )
    parser.add_argument(
        "--check_frames", type=int, help="frames of the checked clips, 4k+1 (default: the world's)"
    )
    parser.add_argument(
        "--sheet", type=Path, help="with the check: save frames of 16 clips as this PNG"
    )
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    member = FAMILY[args.member]
    member = replace(member, steps=args.steps or member.steps)
    work = args.work_dir or WORK / args.member
    home = ASSETS if args.member.startswith("tiny_") else WORK / "family"
    folder = args.output_dir or home / args.member
    if args.stage:
        run_stage(args.stage, work, args.seed, member)
        return
    if not args.check:
        for name in STAGES:
            run_stage(name, work, args.seed, member)
        assemble(work, folder, member)
    elif not folder.is_dir():
        parser.error(f"--check: {folder} is no folder; make it first, without --check")
    if args.check_frames:
        member = replace(member, world=replace(member.world, frames=args.check_frames))
    check(folder, args.check_clips, args.seed, args.sheet, member)


if __name__ == "__main__":
    main()
