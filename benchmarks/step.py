"""What an update costs, and what our loop adds to it: random weights of true shape, made on the
device.

    python benchmarks/step.py --model tiny
    python benchmarks/step.py --model middle --json step.json
    python benchmarks/step.py --model a14b --height 480 --width 832 --num_frames 81 --method dmd

`overhead` is the time of our update over that of a bare loop of the same transformer forwards and
backwards in the same run, the two taking turns so that other load on the machine falls on both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_distillation
from wan_distill.data.run import Sources
from wan_distill.methods.registry import make_method
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.denoiser import Denoiser
from wan_distill.planning import needs, trace
from wan_distill.settings.checks import resolve
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.runtime import Runtime
from wan_distill.training.learner import make_learners
from wan_distill.training.metrics import Metrics

WAN = dict(in_channels=16, out_channels=16, patch_size=[1, 2, 2])
MODELS = {
    "tiny": WAN
    | dict(
        num_attention_heads=4,
        attention_head_dim=32,
        ffn_dim=256,
        num_layers=3,
        text_dim=64,
        freq_dim=64,
    ),
    "middle": WAN
    | dict(
        num_attention_heads=6,
        attention_head_dim=64,
        ffn_dim=1536,
        num_layers=6,
        text_dim=128,
        freq_dim=256,
    ),
    "1.3b": WAN
    | dict(
        num_attention_heads=12,
        attention_head_dim=128,
        ffn_dim=8960,
        num_layers=30,
        text_dim=4096,
        freq_dim=256,
    ),
    "a14b": WAN
    | dict(
        num_attention_heads=40,
        attention_head_dim=128,
        ffn_dim=13824,
        num_layers=40,
        text_dim=4096,
        freq_dim=256,
    ),
}
SMALL_CLIP = dict(height=64, width=64, num_frames=17, max_sequence_length=16)
# The middle model's rank is to its width about what 64 is to A14B's 5120.
CLIP = {
    "tiny": SMALL_CLIP | dict(train_batch_size=8),
    "middle": SMALL_CLIP | dict(train_batch_size=10, rank=8),
}


class RandomInputs:
    """Stands in for prompts and stored samples: tensors of the right shapes, on the device."""

    def __init__(self, config: Config, info: TeacherInfo, device: torch.device):
        self.shape = (config.train_batch_size, *info.latent_shape(config))
        self.text = (
            config.train_batch_size,
            config.max_sequence_length,
            info.transformer["text_dim"],
        )
        self.device = device
        self.knots = (*config.sigmas()[1:],)

    def __len__(self) -> int:
        return 64

    def at(self, rows, sigmas) -> torch.Tensor:
        return torch.randn(self.shape, device=self.device)

    def prompt(self, rows) -> torch.Tensor:
        return torch.randn(self.text, device=self.device)

    batch = prompt


class RandomSources(Sources):
    """Sources whose samples need no solving."""

    def solved(self, kind) -> RandomInputs:
        return self.bank


class Calls:
    """Records every transformer call of an update, so that it can be repeated bare."""

    def __init__(self, transformer):
        self.transformer = transformer
        self.seen: list[tuple[bool, tuple]] = []
        self.seconds = 0.0
        transformer.register_forward_pre_hook(self._record, with_kwargs=True)
        self.recording = False

    def _record(self, module, args, kwargs) -> None:
        if self.recording:
            self.seen.append(
                (
                    torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()),
                    args,
                )
            )


class Bench:
    """One model, one method, one expert: our update and its bare equivalent."""

    def __init__(self, settings: argparse.Namespace, folder: Path):
        self.info = TeacherInfo(
            source="random",
            folder=folder,
            name="random",
            embedded=False,
            boundary_ratio=0.875,
            expand_timesteps=False,
            transformer=MODELS[settings.model],
            vae={},
        )
        chosen = CLIP.get(settings.model, {}) | {
            name: value
            for name, value in vars(settings).items()
            if name
            in (
                "height",
                "width",
                "num_frames",
                "train_batch_size",
                "rank",
                "mixed_precision",
                "gradient_checkpointing",
                "real_score",
                "score_draws",
                "diversity_weight",
            )
            and value is not None
        }
        if not torch.cuda.is_available():
            chosen = {"mixed_precision": "no", "gradient_checkpointing": False} | chosen
        self.config = resolve(
            Config(
                teacher_path="random",
                method=settings.method,
                output_dir=str(folder),
                max_train_steps=10_000,
                critic_warmup_steps=0,
                **chosen,
            ),
            self.info,
        )
        self.runtime = Runtime(self.config)
        self.device = self.runtime.device
        self.transformer = self._transformer()
        inputs = RandomInputs(self.config, self.info, self.device)
        sources = RandomSources(
            self.config, None, inputs, ["a prompt"], inputs.prompt([0])[:1], self.runtime
        )
        sources = type(sources)(**{**vars(sources), "teacher": self})
        self.method = make_method("high", sources)
        for role in self.method.roles:
            add_adapter(
                self.transformer,
                role,
                rank=self.config.rank,
                alpha=self.config.adapter_alpha(role),
                layers=self.config.lora_layers,
                seed=0,
            )
        if self.config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.denoiser = Denoiser({"high": self.transformer}, self.config.boundary)
        parameters = {
            role: adapter_parameters(self.transformer, role) for role in self.method.roles
        }
        self.learners = make_learners(self.method, parameters, self.config)
        self.metrics = Metrics(folder / "metrics.jsonl", self.runtime)
        self.calls = Calls(self.transformer)

    def _transformer(self):
        dtype, before = self.runtime.dtype, torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        with self.device:
            model = WanTransformer3DModel(
                **{k: v for k, v in needs.shape_of(self.config, self.info).transformer}
            )
        torch.set_default_dtype(before)
        return model.requires_grad_(False).eval()

    def update(self, step: int) -> tuple[str, float]:
        """One update as train_distillation.py makes it; (role, seconds)."""
        self._wait()
        started = time.perf_counter()
        role = self.method.role_at(step)
        train_distillation.update(
            self.config, "high", step, self.method, self.denoiser, self.learners[role], self
        )
        self._wait()
        return role, time.perf_counter() - started

    def bare(self, role: str, calls: list) -> float:
        """Seconds of the same forwards, and of one backward through those that had gradients."""
        self._wait()
        started = time.perf_counter()
        with self.denoiser.training(role), self.runtime.autocast():
            outputs = []
            for with_gradient, args in calls:
                with torch.set_grad_enabled(with_gradient):
                    output = self.transformer(*args, return_dict=False)[0]
                if with_gradient:
                    outputs.append(output)
            torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        self._wait()
        seconds = time.perf_counter() - started
        for parameter in self.learners[role].parameters.values():
            parameter.grad = None
        return seconds

    @torch.no_grad()
    def guidance(self, calls: list) -> float:
        """Seconds of a guided evaluation whose two halves are one forward, over those of two
        forwards (median of 5).
        """
        args = calls[0][1]
        both, ratios = [torch.cat([a, a]) for a in args], []
        for _ in range(6):
            seconds = []
            for inputs in ([both], [args, args]):
                self._wait()
                started = time.perf_counter()
                with self.denoiser.acting_as("teacher"), self.runtime.autocast():
                    for one in inputs:
                        self.transformer(*one, return_dict=False)
                self._wait()
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[0] / seconds[1])
        return statistics.median(ratios[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self) -> int:
        """Measured bytes: the allocator's on CUDA, a ledger's of one more update elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        state = [
            t
            for learner in self.learners.values()
            for s in learner.optimizer.state.values()
            for t in s.values()
        ]
        averages = [t for learner in self.learners.values() for t in learner.average.values()]
        held = [*self.transformer.parameters(), *self.transformer.buffers(), *state, *averages]
        largest = 0
        for step in range(self.method.updates(1)):
            with trace.Ledger(held) as ledger:
                self.update(step)
            largest = max(largest, ledger.peak)
        return largest + sum(t.untyped_storage().nbytes() for t in held)

    def run(self, updates: int) -> dict:
        """The figures."""
        ours, bare, evaluations = defaultdict(list), defaultdict(list), defaultdict(list)
        for step in range(-2, updates):
            self.calls.seen, self.calls.recording = [], True
            role, seconds = self.update(abs(step))
            self.calls.recording = False
            plain = self.bare(role, self.calls.seen)
            if step >= 0:
                ours[role].append(seconds)
                bare[role].append(plain)
                evaluations[role].append(sum(len(args[0]) for _, args in self.calls.seen))
        rate = trace.matrix_rate(self.device, self.runtime.dtype)
        flops = self._flops()
        total = sum(map(sum, ours.values()))
        ratios = [o / b for role in ours for o, b in zip(ours[role], bare[role], strict=True)]
        share = sum(flops[role] * len(ours[role]) for role in ours) / total / rate
        return dict(
            overhead=statistics.median(ratios),
            guidance_in_one=self.guidance(self.calls.seen),
            seconds_per_update={role: statistics.median(values) for role, values in ours.items()},
            evaluations_per_update={
                role: statistics.mean(values) for role, values in evaluations.items()
            },
            flops_per_update=flops,
            matmul_rate=rate,
            matmul_share=share,
            peak_bytes=self.peak(),
            predicted_peak_bytes=needs.estimate(self.config, self.info).peak,
            updates=updates,
            device=torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            torch=torch.__version__,
            settings=dict(
                method=self.config.method,
                height=self.config.height,
                width=self.config.width,
                num_frames=self.config.num_frames,
                batch=self.config.train_batch_size,
                mixed_precision=self.config.mixed_precision,
            ),
        )

    def _flops(self) -> dict[str, float]:
        cost = trace.trace(needs.shape_of(self.config, self.info))
        _, updates = needs.arithmetic(self.config, self.info, cost)
        return {role: flops for role, (flops, _) in updates.items()}


def table(model: str, result: dict) -> str:
    """The result as a Markdown table."""
    rows = [
        ("overhead over a bare loop", f"{result['overhead']:.3f}"),
        ("guidance in one forward over two", f"{result['guidance_in_one']:.3f}"),
        *(
            (f"seconds an update, {role}", f"{s:.4f}")
            for role, s in result["seconds_per_update"].items()
        ),
        *(
            (f"evaluations an update, {role}", f"{n:.1f}")
            for role, n in result["evaluations_per_update"].items()
        ),
        ("achieved of the measured matrix rate", f"{result['matmul_share']:.2f}"),
        ("measured matrix rate", f"{result['matmul_rate'] / 1e12:.3g} TFLOP/s"),
        ("peak memory", f"{result['peak_bytes'] / 1e9:.3g} GB"),
        ("peak predicted by --dry_run", f"{result['predicted_peak_bytes'] / 1e9:.3g} GB"),
    ]
    lines = [f"| {model}, {result['settings']['method']}, {result['device']} | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument(
        "--method", choices=("trajectory", "dmd", "consistency"), default="trajectory"
    )
    parser.add_argument("--updates", type=int, default=12)
    for name in ("height", "width", "num_frames", "train_batch_size", "rank", "score_draws"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--diversity_weight", type=float)
    parser.add_argument("--real_score", choices=("guided", "samples"))
    parser.add_argument("--mixed_precision", choices=("no", "bf16"))
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = Bench(settings, Path(folder)).run(settings.updates)
    print(table(settings.model, result))
    if settings.json:
        settings.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
