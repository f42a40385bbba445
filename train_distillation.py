#!/usr/bin/env python
"""Distil a Wan teacher into a student that samples in a few steps without guidance.

    python train_distillation.py                                    the embedded tiny teacher
    python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers     the real one

Reads from top to bottom: parse, load the teacher quietly and tell the truth about its text encoder,
encode the prompts once, train one expert after the other, export, measure, report. To resume, run
the same command again.
"""

from __future__ import annotations

from wan_distill.interrupts import LINE, end_quietly, raise_again

if __name__ == "__main__":
    end_quietly()  # Ctrl-C while the rest is imported

import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_distill.errors import (
    INTERRUPTED,
    RESUMABLE,
    FileError,
    Halted,
    NonFiniteError,
    Stopped,
    UsageError,
)
from wan_distill.layout import RunFolder
from wan_distill.settings.command_line import debug_asked, parse_args
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.picture_source import read_teachers
from wan_distill.settings.resolve import resolve_stages
from wan_distill.system.console import TrainingBar, enter, escape_unencodable, show_job
from wan_distill.system.disk_errors import describe_disk_error
from wan_distill.system.launcher import check_launcher, describe_rank
from wan_distill.system.notices import keep_notices, print_kept

if TYPE_CHECKING:  # torch is imported once the settings are known to be right
    from diffusers import WanPipeline
    from torch import Tensor

    from wan_distill.data import Inputs, PictureSets, PictureSource, Prompt, PromptEmbeddings, Run
    from wan_distill.maths.sigmas import Expert
    from wan_distill.methods import Method
    from wan_distill.model import Denoiser, Teacher
    from wan_distill.planning import Choice
    from wan_distill.results import Reporting
    from wan_distill.system.runtime import Runtime
    from wan_distill.training import Exported, Learner, Monitor, Previews, Progress
    from wan_distill.umt5.verify import Verdict


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 75 stopped by a signal with everything saved (run again to go
    on), 130 stopped by Ctrl-C before anything was begun, 1 anything else.
    """
    argv = sys.argv[1:] if argv is None else argv
    escape_unencodable()
    output_dir = "outputs"
    try:
        raise_again()  # the imports are over
        check_launcher()
        config = parse_args(argv)
        output_dir = config.output_dir or output_dir
        return run(config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return RESUMABLE
    except KeyboardInterrupt:  # later the run itself takes the signal
        print(LINE, file=sys.stderr)
        return INTERRUPTED
    except Halted as halted:
        print_kept(halted)
        print(f"error: {halted}", file=sys.stderr, flush=True)
        return 1
    except UsageError as error:
        if debug_asked(argv):
            traceback.print_exc()
        print_kept(error)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if debug_asked(argv):
            raise
        print(f"error: {describe_disk_error(error, output_dir)}", file=sys.stderr)
        return 1
    except Exception as error:
        print_kept(error)
        if rank := describe_rank():  # which of many: the others only see that a peer is gone
            print(f"{rank} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise


def run(config: Config) -> int:
    """The whole job, or the part of it that the flags ask for."""
    with keep_notices(shown=config.verbose_loading):
        from wan_distill import data, model, planning, results
        from wan_distill.system.files import lock_file, make_output_folder
        from wan_distill.system.runtime import Runtime

    # 1. What is to be done? Everything that can be refused is refused before any weights load.
    info = read_teachers(config)
    resolved = resolve_stages(config, info)[-1]
    if resolved.clean:
        return clean(resolved)
    pictures = data.read_picture_sets(resolved, info)  # none for a text-to-video teacher
    prompts, held_out = data.prompts_of(resolved, info, pictures)
    choice = planning.within_budget(config, info, len(prompts) + len(held_out))
    stages = choice.stages
    config = stages[-1]  # what the job is judged by
    if config.push_to_hub:
        results.check_hub(config)
    results.check_evaluated(config, info)
    if config.dry_run:
        return planning.print_plan(stages, info, prompts, held_out, choice.words)
    texts = [data.text_of(prompt) for prompt in (*prompts, *held_out)]
    surroundings = planning.check_surroundings(stages, info, texts)

    if not config.verbose_loading:
        model.hide_loading_bars()
    folder = RunFolder(Path(config.output_dir))
    make_output_folder(folder.path)
    runtime = Runtime(config)
    with lock_file(folder.lock, runtime.is_main):
        results.check_output(config)
        return carry_out(choice, info, prompts, held_out, pictures, surroundings, runtime)


def clean(config: Config) -> int:
    """Deletes the caches of a finished run. Exit code: 0."""
    from wan_distill.planning.wording import size
    from wan_distill.system.cleaning import bytes_of, check_run, checkpoints_in, remove_caches
    from wan_distill.system.files import lock_file

    folder = RunFolder(Path(config.output_dir))
    check_run(folder)  # before anything is made there
    with lock_file(folder.lock, is_main=True):
        freed = remove_caches(folder)
    kept = size(bytes_of(checkpoints_in(folder)))
    shared = f", and caches in {config.samples_dir}" if config.samples_dir else ""
    print(f"Deleted {size(freed)} of caches in {folder.path}; {kept} of checkpoints stay{shared}")
    return 0


def carry_out(
    choice: Choice,
    info: TeacherInfo,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    pictures: PictureSets,
    surroundings: Sequence[str],
    runtime: Runtime,
) -> int:
    """The part of the job that writes into the output folder, which no other run does meanwhile."""
    from wan_distill import data, planning, results, training

    stages = choice.stages
    config = stages[-1]  # what the job is judged by
    folder = RunFolder(Path(config.output_dir))
    training.check_belonging(stages, info, prompts, runtime.sample_groups, runtime.say)
    hardware = planning.hardware_of(config, info)
    counts = len(prompts), len(held_out)
    runtime.say(*planning.headline(stages, info, *counts, hardware), *choice.words, "")
    if runtime.is_main:
        plan = planning.describe_plan(stages, info, prompts, held_out, choice.words)
        lines = [plan, "", "On this machine:", *surroundings, ""]
        folder.plan.write_text("\n".join(lines), encoding="utf-8")
        planning.remember(choice)
    with show_job(planning.timeline(stages, info, sum(counts), hardware), hardware.slower):
        do_job(stages, info, prompts, held_out, pictures, runtime)
    if runtime.is_main:
        runtime.say(*results.closing(config, info, data.text_of([*held_out, *prompts][0])))
    return 0


def do_job(
    stages: Sequence[Config],
    info: TeacherInfo,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    pictures: PictureSets,
    runtime: Runtime,
) -> None:
    """Encodes, trains, exports and measures."""
    from wan_distill import data, model, planning, results, training
    from wan_distill.system.files import make_output_folder

    config = stages[-1]  # what the job is judged by
    folder = RunFolder(Path(config.output_dir))
    # 2. The teacher's text encoder: loaded quietly, verified against its file, used once, freed.
    teacher = model.Teacher(info, config, runtime)
    shown = training.validation_prompts(config, held_out)
    read = training.prompts_read(stages, prompts, held_out)
    encoded = [*map(data.text_of, read), config.negative_prompt]
    reporting = results.Reporting(stages, info, runtime)
    reporting.begin(len(prompts) + len(held_out))
    with reporting.part("text encoder"):
        embeddings, verdict = encode_prompts(config, teacher, encoded, runtime)

    first_frames = None
    if info.takes_picture:
        if pictures.source is not None:
            with reporting.part("making pictures"):
                make_pictures(pictures.source, read, runtime)
        what = "encoding pictures"
        with reporting.part(what), planning.explain_out_of_memory(config, info, what):
            first_frames = data.encode_pictures(config, teacher, pictures, read, runtime)

    # 3. Stage by stage, one expert after the other learns its own steps.
    runs = [
        data.Run(stage, teacher, embeddings, tuple(prompts), runtime, first_frames)
        for stage in stages
    ]
    job = runs[-1]
    if not config.evaluate_only:
        if runtime.device.type != "cpu":  # if memory runs out, then now, not after hours of solving
            for part in runs:
                what = "rehearsing one update of each role"
                with planning.explain_out_of_memory(part.config, info, what):
                    training.rehearse(part, config.experts[0])
        for part in runs:
            make_output_folder(part.folder.path)
            for line in model.carry_over(part.config, info) if runtime.is_main else ():
                runtime.say(line)
            runtime.state.wait_for_everyone()  # all begin with what was carried over
            for expert in part.config.experts:
                distil(part, expert, shown, reporting)

    # 4. What is left behind, and how good it is.
    if runtime.is_main and not config.evaluate_only:
        results.export_student(job)
        known = set(read)
        results.write_first_frame(
            job, next(prompt for prompt in (*held_out, *prompts) if prompt in known)
        )
    if config.evaluate or config.evaluate_only:
        enter("evaluate")
        pairs = config.evaluation == "pairs"
        kind = results.PairedEvaluation if pairs else results.Evaluation
        what = "measuring the student"
        with reporting.part("evaluation"), planning.explain_out_of_memory(config, info, what):
            measured = kind(job, held_out).measure()
        if measured:
            print(f"\n{results.as_markdown(measured)}\n")
    if runtime.is_main:
        evaluation = results.read_evaluation(folder)
        results.describe_results(stages, teacher, verdict, evaluation)
        reporting.finish(evaluation)
        if config.push_to_hub:
            print(f"Uploaded to {results.push(stages, info, evaluation)}")


# ------------------------------------------------------------------------------- the text encoder


def encode_prompts(
    config: Config, teacher: Teacher, prompts: Sequence[str], runtime: Runtime
) -> tuple[PromptEmbeddings, Verdict]:
    """Encodes each distinct prompt once, with the teacher's verified text encoder, which is then
    freed. Where the cache of this very encoder has all of them, it is not loaded at all.
    """
    from wan_distill.data import PromptEmbeddings, caches_of
    from wan_distill.umt5.verify import recall, remember

    def cache_of(verdict: Verdict) -> PromptEmbeddings:
        key = dict(
            encoder=verdict.fingerprint,
            tokenizer=verdict.tokenizer,
            length=config.max_sequence_length,
            dtype=config.mixed_precision,
        )
        return PromptEmbeddings(folder.prompts, key, config.max_sequence_length, runtime.device)

    enter("encode")
    folder = caches_of(config)
    source = teacher.fetch("text_encoder")
    files = teacher.info.fingerprint(("text_encoder", "tokenizer"))
    known = None if config.verbose_loading else recall(folder.encoder_note, files)
    if known is not None and not cache_of(known).missing(prompts):
        every = "An earlier run verified it; every prompt is in the cache, so it is not loaded."
        runtime.say(*known.explain(), every)
        runtime.state.wait_for_everyone()
        return cache_of(known), known

    if runtime.is_main:
        pipeline, verdict = load_encoder(config, teacher, source, runtime)
        runtime.say(*verdict.explain())
        encode = partial(encode_one, pipeline, config.max_sequence_length, runtime)
        cache_of(verdict).fill(prompts, encode, shown=True)
        remember(verdict, folder.encoder_note, files)
    runtime.state.wait_for_everyone()
    if not runtime.is_main:  # a second copy of the encoder would only take memory
        noted = recall(folder.encoder_note, files)
        if noted is None:
            raise Halted(
                f"{folder.encoder_note}: the main process wrote it, this one cannot read it; all "
                "processes need the same --output_dir, on a disk that all of them see"
            )
        verdict = noted
    return cache_of(verdict), verdict


def make_pictures(source: PictureSource, read: Sequence[Prompt], runtime: Runtime) -> None:
    """Makes those of the pictures of `read` that are missing, with a text-to-video teacher whose
    parts are loaded one after the other.
    """
    from wan_distill import data, model, planning

    rows = source.missing(data.keys_of(read))
    if not rows:
        return
    runtime.say(f"{source.info.title} makes {len(rows)} of the pictures.")
    teacher = model.Teacher(source.info, source.config, runtime)
    texts = [source.prompts[row] for row in rows]
    with planning.explain_out_of_memory(source.config, source.info, "making pictures"):
        encoded = [*texts, source.config.negative_prompt]
        embeddings, _ = encode_prompts(source.config, teacher, encoded, runtime)
        enter("make pictures")
        source.make(data.Run(source.config, teacher, embeddings, source.prompts, runtime), rows)


def load_encoder(
    config: Config, teacher: Teacher, source: Path, runtime: Runtime
) -> tuple[WanPipeline, Verdict]:
    """The teacher's pipeline with its text side alone, and the Verdict on that."""
    from diffusers import WanPipeline

    from wan_distill.model import scheduler_for
    from wan_distill.umt5.text import load_text

    try:
        encoder, tokenizer, verdict = load_text(
            source,
            dtype=runtime.dtype,
            variant=config.variant,
            allow_pickle=config.allow_pickle,
            verbose=config.verbose_loading,
        )
    except FileError as error:
        raise UsageError(f"--teacher_path {teacher.info.source}: {error}") from error
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.to(runtime.device),
        vae=None,
        scheduler=scheduler_for(config),
    )
    return pipeline, verdict


def encode_one(pipeline: WanPipeline, length: int, runtime: Runtime, prompt: str) -> Tensor:
    """The embedding [L, D] of one prompt, as the pipeline makes it."""
    embedding, _ = pipeline.encode_prompt(
        prompt,
        do_classifier_free_guidance=False,
        max_sequence_length=length,
        device=runtime.device,
    )
    return embedding[0]


# --------------------------------------------------------------------------------- the training


def distil(run: Run, expert: Expert, shown: Sequence[Prompt], reporting: Reporting) -> None:
    """Trains one expert's student and writes it. Raises Stopped after a signal, with everything
    saved.
    """
    from wan_distill import data, methods, model, planning, training

    config, info = run.config, run.info
    method = methods.make_method(config, expert)
    inputs = data.open_inputs(run, expert)
    monitor = training.Monitor(run, expert)
    previews = training.Previews(run, expert, shown)

    # Solve exactly what this expert learns from and is compared with.
    micro_batches = config.gradient_accumulation_steps * run.runtime.sample_groups
    read = [*inputs.requests(method.rows_read(micro_batches)), *monitor.requests()]
    shown_before = training.is_done(config, info, expert) and not previews.lack(monitor.chosen())
    enter("solve")
    what = "solving samples"
    with reporting.part(what), planning.explain_out_of_memory(config, info, what):
        # Of an expert that is trained and shown nothing is read any more: --clean may have run.
        data.solve_missing(run, [] if shown_before else [*read, *previews.requests()])
    enter(planning.stage_name(config, expert))
    what = f"training the {expert} expert"
    with reporting.training(config, expert), planning.explain_out_of_memory(config, info, what):
        student = train(run, expert, method, inputs, monitor, previews, reporting)
    if run.runtime.is_main:
        place = run.folder.path
        model.save_student(place, student.weights, config, info, expert, student.updates)
    run.runtime.state.wait_for_everyone()


def train(
    run: Run,
    expert: Expert,
    method: Method[Any],
    inputs: Inputs,
    monitor: Monitor,
    previews: Previews,
    reporting: Reporting,
) -> Exported:
    """The loop of one expert: role, update, metrics, monitor, previews, checkpoint. Returns the
    student that is to be exported.
    """
    from wan_distill import model, training

    config, info, runtime = run.config, run.info, run.runtime
    transformer = run.teacher.load_expert(expert)
    parameters = model.make_roles(transformer, method.roles, config, expert)
    if config.init_student_from:
        earlier = model.warm_start_files(config, info)[expert]
        for role in method.roles if config.critic_from_student else ("student",):
            if note := model.begin_as(transformer, role, earlier):
                runtime.say(f"{role}: {note}")
    model.recompute_blocks(transformer, config)
    denoiser = run.denoiser(expert, transformer, config.whole_student)
    learners = training.make_learners(method, parameters, config)
    student = learners["student"]
    metrics = training.Metrics(run.folder.metrics, runtime)
    progress = training.Progress(run, expert, learners, metrics, reporting.folder.path)
    first = progress.resume()
    last = method.updates(config.max_train_steps)
    monitor.resume(first)
    previews.resume(student.done if first else -1)
    with reporting.checks():
        if first == 0 and monitor.due(student):  # what a warm start begins with is a candidate too
            metrics.note(**monitor.check(denoiser, student))
        if first == 0 and previews.due(0):
            previews.write(denoiser, student)
            reporting.previews(config, expert, 0, 0)

    with TrainingBar(first, last, runtime.is_main) as bar:
        for step in range(first, last):
            role = method.role_at(step)
            if not update(run, step, method, inputs, denoiser, learners[role], progress):
                if step > first:
                    progress.save(step)
                raise Stopped(stopped_after(step, expert))
            done = step + 1
            bar.update()
            if role == "student" and monitor.due(student, last=done == last):
                with reporting.checks():
                    metrics.note(**monitor.check(denoiser, student))
            if method.is_interval(done, config.logging_steps) or done == last:
                line = metrics.write(
                    expert=expert,
                    step=done,
                    student_updates=student.done,
                    learning_rate=student.learning_rate(),
                )
                bar.show(line)
                reporting.line(line, config)
            if role == "student" and previews.due(student.done, last=done == last):
                with reporting.checks():
                    previews.write(denoiser, student)
                    reporting.previews(config, expert, done, student.done)
            stopping = runtime.stop_requested()
            interval = method.is_interval(done, config.checkpointing_steps)
            if interval or done == last or stopping or progress.overdue():
                progress.save(done)
            if stopping:
                raise Stopped(stopped_after(done, expert))
    runtime.state.wait_for_everyone()  # what the main process wrote last is read by all
    exported = monitor.exported(student)
    with reporting.checks():
        previews.write_exported(denoiser, student, exported)
    return exported


def update(
    run: Run,
    step: int,
    method: Method[Any],
    inputs: Inputs,
    denoiser: Denoiser,
    learner: Learner,
    progress: Progress,
) -> bool:
    """One optimizer update of one role; False where a signal stopped it on its way, and no weight
    was changed. A loss or gradient that is not finite never reaches the weights.
    """
    runtime, accumulation = run.runtime, run.config.gradient_accumulation_steps
    drawn = method.draws_of(step)
    values, metrics = [], []
    with denoiser.training(learner.role):  # through backward: see Denoiser.training
        for micro in range(accumulation):
            if micro and runtime.stop_requested():  # an update of A14B takes minutes
                learner.forget_gradients()
                return False
            index = runtime.micro_batch(drawn, micro, accumulation)
            batch = method.batch_at(inputs, drawn, index)
            rng = run.generator(method.expert, index)
            for loss in method.losses(learner.role, denoiser, batch, rng):
                (loss.value / accumulation).backward()
                values.append(loss.value.detach())
                metrics.append(loss.metrics)
    total = sum(values[1:], start=values[0])
    try:
        norm = learner.update(runtime, total)
    except NonFiniteError as error:
        progress.skip_or_stop(step, learner.role, denoiser, error)
        return True
    progress.metrics.add(**{f"{learner.role}_loss": total / accumulation})
    for part in metrics:
        progress.metrics.add(**part)
    progress.metrics.add(**{f"{learner.role}_gradient_norm": norm})
    return True


def stopped_after(step: int, expert: Expert) -> str:
    return f"Stopped after update {step} of the {expert} expert. Run the same command to go on."


if __name__ == "__main__":
    sys.exit(main())
