#!/usr/bin/env python
"""Distil a Wan text-to-video teacher into a student that samples in a few steps without guidance.

    python train_distillation.py                                                     the embedded tiny teacher
    python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers     the real one

Reads from top to bottom: parse, load the teacher quietly and tell the truth about its text encoder,
encode the prompts once, train one expert after the other, export, measure, report. To resume, run
the same command again.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from wan_distill.errors import RESUMABLE, Halted, Stopped, UsageError
from wan_distill.settings.checks import resolve
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.config import Config
from wan_distill.system.console import speak_plainly


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 75 stopped by a signal with everything saved (run again to go
    on).
    """
    argv = sys.argv[1:] if argv is None else argv
    speak_plainly()
    try:
        return run(parse_args(argv))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return RESUMABLE
    except Halted as halted:
        print(f"error: {halted}", file=sys.stderr, flush=True)
        return 1
    except UsageError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full or read-only disk; whatever was complete is still there
        if "--debug" in argv or error.filename is None:
            raise
        print(
            f"error: {error.filename}: {error.strerror}; what was complete is kept: once there is "
            "room and "
            "permission, run the same command to go on",
            file=sys.stderr,
        )
        return 1
    except Exception as error:
        if "WORLD_SIZE" in os.environ:  # which of many: the others only see that a peer is gone
            print(
                f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} failed: "
                f"{type(error).__name__}: {error}",
                file=sys.stderr,
                flush=True,
            )
        raise


def run(config: Config) -> int:
    """The whole job, or the part of it that the flags ask for."""
    from wan_distill.data.prompts import split_prompts
    from wan_distill.planning.plan import describe_needs, describe_plan
    from wan_distill.planning.preflight import check_surroundings
    from wan_distill.settings.description import read_teacher

    # 1. What is to be done? Everything that can be refused is refused here, before any weights
    # load.
    info = read_teacher(config)
    config = resolve(config, info)
    prompts, held_out = split_prompts(config, info)
    if config.dry_run:
        print(
            describe_plan(config, info, prompts, held_out),
            describe_needs(config, info),
            *check_surroundings(config, info),
            sep="\n",
        )
        return 0
    check_surroundings(config, info)

    from wan_distill.data.run import Sources
    from wan_distill.model.loading import Teacher, quiet_loading
    from wan_distill.planning.needs import explain_out_of_memory
    from wan_distill.results.evaluation import Evaluation, as_markdown
    from wan_distill.results.export import export_student
    from wan_distill.results.hub import push
    from wan_distill.results.page import write_page
    from wan_distill.results.readme import describe_results
    from wan_distill.system.files import claim
    from wan_distill.system.runtime import Runtime
    from wan_distill.training.metrics import Tracker
    from wan_distill.training.previews import validation_prompts
    from wan_distill.training.resume import check_resume, identity

    if not config.verbose_loading:
        quiet_loading()
    claim(Path(config.output_dir))
    runtime = Runtime(config)
    check_resume(config, identity(config, info, prompts, runtime.sample_groups), runtime.say)
    plan = describe_plan(config, info, prompts, held_out)
    runtime.say(plan, "")

    # 2. The teacher's text encoder: loaded quietly, verified against its file, used once, let go.
    teacher, shown = Teacher(info, config, runtime), validation_prompts(config, held_out)
    bank, verdict = encode_prompts(
        config, teacher, [*prompts, *held_out, *shown, config.negative_prompt], runtime
    )
    if runtime.is_main:
        (Path(config.output_dir) / "plan.txt").write_text(plan + "\n", encoding="utf-8")
    negative = bank.batch([config.negative_prompt])

    # 3. One expert after the other learns its own steps.
    if not config.evaluate_only:
        sources = Sources(config, teacher, bank, prompts, negative, runtime)
        tracker = Tracker(config, runtime)
        for expert in config.experts:
            with explain_out_of_memory(config, info, f"training the {expert} expert"):
                train(config, expert, sources, shown, tracker, runtime)
        tracker.finish()

    # 4. What is left behind, and how good it is.
    if runtime.is_main:
        evaluation = None
        if not config.evaluate_only:
            export_student(config, teacher)
        if config.evaluate or config.evaluate_only:
            evaluation = Evaluation(config, teacher, bank, held_out, runtime).run(negative)
            print(f"\n{as_markdown(evaluation)}\n")
        describe_results(config, teacher, verdict, evaluation)
        write_page(Path(config.output_dir), config, info)
        if config.push_to_hub:
            print(f"Uploaded to {push(config, info, evaluation)}")
        print(
            f"Done: {Path(config.output_dir).resolve()} (report.html shows it, README.md how to "
            "use the student)"
        )
    return 0


def encode_prompts(config: Config, teacher, prompts: list[str], runtime):
    """Encodes each distinct prompt once, with the teacher's verified text encoder, which is then
    let go.

    Where all of them are in the cache of this very encoder it is not loaded at all.
    """
    import torch

    from wan_distill.data.embeddings import PromptBank
    from wan_distill.system.console import progress_bar
    from wan_distill.umt5.verify import recall, remember

    def bank_of(verdict) -> PromptBank:
        key = dict(
            encoder=verdict.fingerprint,
            length=config.max_sequence_length,
            dtype=config.mixed_precision,
        )
        return PromptBank(folder, key, config.max_sequence_length, runtime.device)

    folder = Path(config.output_dir) / "prompts"
    note, source = folder / "encoder.json", teacher.fetch("text_encoder")
    files = teacher.info.fingerprint(("text_encoder", "tokenizer"))
    known = None if config.verbose_loading else recall(note, files)
    if known and not bank_of(known).missing(prompts):
        runtime.say(
            *known.explain(),
            "So an earlier run found; every prompt is in the cache and the encoder is not loaded.",
            "",
        )
        runtime.state.wait_for_everyone()
        return bank_of(known), known

    pipeline, verdict = load_encoder(config, teacher, source, runtime)
    runtime.say(*verdict.explain(), "")
    bank = bank_of(verdict)
    missing = bank.missing(prompts)
    with progress_bar(len(missing), "prompts", "prompt", runtime.is_main) as bar:
        for prompt in missing if runtime.is_main else []:
            with torch.no_grad():
                padded, _ = pipeline.encode_prompt(
                    prompt,
                    do_classifier_free_guidance=False,
                    max_sequence_length=config.max_sequence_length,
                    device=runtime.device,
                )
            bank.store(prompt, padded[0])
            bar.update()
    if runtime.is_main:
        remember(verdict, note, files)
    runtime.state.wait_for_everyone()
    return bank, verdict


def load_encoder(config: Config, teacher, source: Path, runtime):
    """The teacher pipeline with its text encoder alone, loaded inside the filter, and the Verdict
    on that encoder.
    """
    from diffusers import WanPipeline

    from wan_distill.errors import TextEncoderError
    from wan_distill.model.student_files import scheduler_for
    from wan_distill.umt5.repair import load_text_encoder
    from wan_distill.umt5.silence import silence_tied_weight_report

    try:
        with silence_tied_weight_report(config.verbose_loading):
            encoder, verdict = load_text_encoder(
                source,
                dtype=runtime.dtype,
                variant=config.variant,
                allow_pickle=config.allow_pickle,
                verbose=config.verbose_loading,
            )
            pipeline = WanPipeline.from_pretrained(
                teacher.info.folder,
                text_encoder=encoder.to(runtime.device),
                vae=None,
                transformer=None,
                transformer_2=None,
                scheduler=scheduler_for(config),
            )
    except TextEncoderError as error:
        raise UsageError(f"--teacher_path {teacher.info.source}: {error}") from error
    except Exception as error:  # damaged tokenizers fail in any way
        raise UsageError(
            f"--teacher_path {teacher.info.source}: its pipeline does not load "
            f"({' '.join(str(error).split())}); download it again"
        ) from error
    return pipeline, verdict


def train(config: Config, expert: str, sources, shown: list[str], tracker, runtime) -> None:
    """Trains one expert's student and writes it. Raises Stopped after a signal, with everything
    saved.
    """
    from wan_distill.layout import LORA_FILE
    from wan_distill.methods.registry import make_method
    from wan_distill.model.adapters import make_roles
    from wan_distill.model.denoiser import Denoiser
    from wan_distill.model.student_files import init_student, save_student
    from wan_distill.results.page import write_page
    from wan_distill.system.console import TrainingBar
    from wan_distill.training.learner import make_learners
    from wan_distill.training.metrics import Metrics
    from wan_distill.training.monitor import Monitor
    from wan_distill.training.previews import Previews
    from wan_distill.training.resume import Progress

    output_dir, info = Path(config.output_dir), sources.teacher.info
    method = make_method(expert, sources)
    monitor, previews = (
        Monitor(expert, sources, output_dir / expert),
        Previews(expert, sources, shown),
    )
    transformer = sources.teacher.load_expert(expert)
    parameters = make_roles(transformer, method, config, expert)
    if config.init_student_from:
        init_student(transformer, Path(config.init_student_from) / LORA_FILE[expert])
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    denoiser = Denoiser(
        {expert: transformer}, config.boundary, info.expand_timesteps, bool(config.student_layers)
    )
    learners = make_learners(method, parameters, config)
    student, metrics = learners["student"], Metrics(output_dir / "metrics.jsonl", runtime)
    progress = Progress(expert, sources, output_dir / expert, learners, metrics)
    first, last = progress.resume(), method.updates(config.max_train_steps)
    monitor.resume(first)
    if first == 0 and monitor.due(student):  # what a warm start begins with is a candidate too
        metrics.note(**monitor.look(denoiser, student))

    with TrainingBar(expert, first, last, config, runtime.is_main) as bar:
        for step in range(first, last):
            if step == 0 and previews.due(step, last):
                previews.write(denoiser, student, step)
            role = method.role_at(step)
            update(config, expert, step, method, denoiser, learners[role], progress)
            done = step + 1
            bar.update()
            if role == "student" and monitor.due(student, last=done == last):
                metrics.note(**monitor.look(denoiser, student))
            if done % config.logging_steps == 0 or done == last:
                line = metrics.write(
                    expert=expert, step=done, learning_rate=student.learning_rate()
                )
                bar.tell(line)
                tracker.log(line, config.experts.index(expert) * last)
            if previews.due(done, last):
                previews.write(denoiser, student, done)
                write_page(output_dir, config, info)
            stopping = runtime.stop_requested()
            if done % config.checkpointing_steps == 0 or done == last or stopping:
                progress.save(done)
            if stopping:
                raise Stopped(
                    f"Stopped after update {done} of the {expert} expert. Run the same command to "
                    "go on."
                )

    if runtime.is_main:
        save_student(output_dir, monitor.exported(student), config, info, expert)
    runtime.state.wait_for_everyone()


def update(config: Config, expert: str, step: int, method, denoiser, learner, progress) -> None:
    """One optimizer update of one role. A loss or gradient that is not finite never reaches the
    weights.
    """
    from wan_distill.errors import NonFiniteError
    from wan_distill.maths.randomness import generator

    runtime, seen, drawn = progress.runtime, [], method.drawn_at(step)
    with denoiser.training(
        learner.role
    ):  # through backward: checkpointing recomputes with the active adapter
        for micro in range(config.gradient_accumulation_steps):
            index = runtime.micro_batch(drawn, micro)
            with runtime.autocast():
                loss = method.loss(
                    learner.role,
                    denoiser,
                    method.batch_at(drawn, index),
                    generator(config.seed, expert, index),
                )
            (loss.value / config.gradient_accumulation_steps).backward()
            seen.append({f"{learner.role}_loss": loss.value.detach(), **loss.metrics})
    try:
        norm = learner.update(runtime, sum(values[f"{learner.role}_loss"] for values in seen))
    except NonFiniteError as error:
        progress.skip_or_stop(step, learner.role, denoiser, error)
        return
    for values in seen:
        progress.metrics.add(**values)
    progress.metrics.add(**{f"{learner.role}_gradient_norm": norm})


if __name__ == "__main__":
    sys.exit(main())
