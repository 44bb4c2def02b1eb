//! What a specification must hold beyond its types: ranges, and keys that must fit each other.

use super::{
    AdaptiveDeadline, Aggregation, CheckpointSpec, EvaluationSpec, OptimizerSpec, OuterOptimizer,
    ParticipationSpec, RunSpec, Sampling, StreamingSpec, TokenizerSpec, TrainingSpec, aggregation,
    validate::Problem,
};
use crate::{
    chunk::{CHUNK_PARAMETERS_MAX, CHUNK_PARAMETERS_MIN},
    model::Architecture,
    schedule::Schedule,
    tokenizer::BYTE_VOCABULARY,
    units,
};

/// Most rounds of a run.
pub const ROUNDS_MAX: u32 = 1_000_000;
/// Most parameters of a model: what can be trained on one site's machine with some room to grow.
pub const PARAMETERS_MAX: u64 = 100_000_000_000;
/// Most chunks of a model: keeps the list of chunks that a resumed upload names far below the largest
/// message.
pub const CHUNKS_MAX: u64 = 1 << 17;
/// Most sites in a round.
pub const CLIENTS_MAX: u32 = 4_096;
/// Longest deadline of a round: 90 days.
pub const DEADLINE_SECONDS_MAX: u64 = 90 * 24 * 3600;
/// Most rounds that a delta may be late: as many versions of the model the aggregator may have to keep.
pub const STALENESS_MAX: u32 = 64;
/// Most tokens that one site trains in a whole run. Sums over [`CLIENTS_MAX`] sites still fit 64 bits.
pub const TOKENS_PER_SITE_MAX: u64 = 1_000_000_000_000_000;
const DEVIATIONS_MAX: f64 = 1000.0;
const STALENESS_EXPONENT_MAX: f64 = 100.0;
const LOCAL_STEPS_MAX: u32 = 1_000_000;
const BATCH_SIZE_MAX: u32 = 1 << 16;
const EVALUATION_TOKENS_MAX: u64 = 1_000_000_000_000;
const HELD_OUT_FRACTION_MAX: f64 = 0.5;

/// Every rule that `spec` breaks. `faulty` are paths that were repaired before: no rule that looks at one
/// of them is applied, since what it would say is about a value that nobody wrote.
pub(super) fn problems(spec: &RunSpec, faulty: &[String]) -> Vec<Problem> {
    let mut rules = Rules { faulty, problems: Vec::new() };
    rules.check(&["rounds"], (1..=ROUNDS_MAX).contains(&spec.rounds), || {
        format!("is {}; allowed: 1 to {ROUNDS_MAX}", spec.rounds)
    });
    model(&mut rules, &spec.model, spec.wire.chunk_parameters);
    tokenizer(&mut rules, &spec.tokenizer, spec.model.vocab_size());
    if let Some(start) = &spec.start {
        let path = "start.checkpoint";
        rules.check(&[path], !start.checkpoint.is_empty(), || "is empty; allowed: any other text".to_owned());
    }
    training(&mut rules, &spec.training, &spec.model);
    optimizer(&mut rules, &spec.training.optimizer);
    schedule(&mut rules, &spec.training.schedule, spec.run_steps());
    tokens(&mut rules, spec);
    outer(&mut rules, &spec.outer.optimizer);
    aggregation(&mut rules, &spec.outer.aggregation, &spec.participation);
    streaming(&mut rules, spec);
    participation(&mut rules, &spec.participation, spec.training.local_steps);
    evaluation(&mut rules, &spec.evaluation);
    checkpoints(&mut rules, &spec.checkpoints);
    rules.problems
}

/// What of the learning rate's schedule does not fit into `steps` steps.
pub(super) fn schedule_problems(spec: &RunSpec, steps: u64) -> Vec<Problem> {
    let mut rules = Rules { faulty: &[], problems: Vec::new() };
    schedule(&mut rules, &spec.training.schedule, steps);
    rules.problems
}

struct Rules<'a> {
    faulty: &'a [String],
    problems: Vec<Problem>,
}

impl Rules<'_> {
    /// Reports at the first of `paths`, all of which the rule looks at, unless it `holds`.
    fn check(&mut self, paths: &[&str], holds: bool, message: impl FnOnce() -> String) {
        if !holds && paths.iter().all(|path| self.sound(path)) {
            self.problems.push(Problem { path: paths[0].to_owned(), message: message() });
        }
    }

    /// A number that must lie in a range; the ends that are allowed are said in `allowed`.
    fn number(&mut self, path: &str, value: f64, holds: bool, allowed: &str) {
        self.check(&[path], value.is_finite() && holds, || format!("is {value}; allowed: {allowed}"));
    }

    /// Whether nothing at, above or below `path` was repaired.
    fn sound(&self, path: &str) -> bool {
        let covers = |outer: &str, inner: &str| {
            inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        !self.faulty.iter().any(|faulty| covers(faulty, path) || covers(path, faulty))
    }
}

fn model(rules: &mut Rules<'_>, model: &Architecture, chunk_parameters: u32) {
    let problems = model.problems();
    let sizes_hold = problems.is_empty();
    for (key, message) in problems {
        rules.check(&[&format!("model.{key}")], false, || message);
    }
    let chunk_holds = (CHUNK_PARAMETERS_MIN..=CHUNK_PARAMETERS_MAX).contains(&chunk_parameters);
    rules.check(&["wire.chunk_parameters"], chunk_holds, || {
        format!("is {chunk_parameters}; allowed: {CHUNK_PARAMETERS_MIN} to {CHUNK_PARAMETERS_MAX}")
    });
    if !sizes_hold {
        return;
    }
    let parameters = model.manifest().parameters();
    rules.check(&["model"], parameters <= PARAMETERS_MAX, || {
        format!(
            "has {} parameters; allowed: up to {}",
            units::count(parameters),
            units::count(PARAMETERS_MAX)
        )
    });
    if chunk_holds && parameters <= PARAMETERS_MAX {
        let chunks = parameters.div_ceil(u64::from(chunk_parameters));
        rules.check(&["wire.chunk_parameters", "model"], chunks <= CHUNKS_MAX, || {
            let minimum = parameters.div_ceil(CHUNKS_MAX);
            format!("is {chunk_parameters}, which cuts the model into {chunks} chunks; allowed for its {parameters} parameters: {minimum} or more")
        });
    }
}

fn tokenizer(rules: &mut Rules<'_>, tokenizer: &TokenizerSpec, vocab_size: usize) {
    match tokenizer {
        TokenizerSpec::Byte {} => {
            rules.check(&["model.vocab_size", "tokenizer.kind"], vocab_size >= BYTE_VOCABULARY, || {
                format!("is {vocab_size}; allowed with the byte tokenizer: {BYTE_VOCABULARY} or more")
            });
        }
        TokenizerSpec::File { path, end_of_text } => {
            for (key, text) in [("tokenizer.path", path), ("tokenizer.end_of_text", end_of_text)] {
                rules.check(&[key], !text.is_empty(), || "is empty; allowed: any other text".to_owned());
            }
        }
    }
}

fn training(rules: &mut Rules<'_>, training: &TrainingSpec, model: &Architecture) {
    let TrainingSpec { local_steps, batch_size, micro_batch_size, sequence_length, gradient_clip, .. } =
        *training;
    rules.check(&["training.local_steps"], (1..=LOCAL_STEPS_MAX).contains(&local_steps), || {
        format!("is {local_steps}; allowed: 1 to {LOCAL_STEPS_MAX}")
    });
    let batch_holds = (1..=BATCH_SIZE_MAX).contains(&batch_size);
    rules.check(&["training.batch_size"], batch_holds, || {
        format!("is {batch_size}; allowed: 1 to {BATCH_SIZE_MAX}")
    });
    let divides = micro_batch_size == 0 || batch_size.is_multiple_of(micro_batch_size);
    rules.check(&["training.micro_batch_size", "training.batch_size"], divides || !batch_holds, || {
        format!("is {micro_batch_size}; allowed: 0, or what divides training.batch_size = {batch_size}")
    });
    let context_length = model.context_length();
    let context_path = format!("model.{}", model.context_key());
    let fits = sequence_length > 0 && sequence_length as usize <= context_length;
    rules.check(&["training.sequence_length", &context_path], fits, || {
        format!("is {sequence_length}; allowed: 1 to the model's context length, {context_length}")
    });
    rules.number(
        "training.gradient_clip",
        gradient_clip,
        gradient_clip >= 0.0,
        "0 (never), or a positive number",
    );
}

fn optimizer(rules: &mut Rules<'_>, optimizer: &OptimizerSpec) {
    let path = |key: &str| format!("training.optimizer.{key}");
    let (learning_rate, momentum, beta1, beta2, epsilon, weight_decay) = match *optimizer {
        OptimizerSpec::AdamW { learning_rate, beta1, beta2, epsilon, weight_decay }
        | OptimizerSpec::Adopt { learning_rate, beta1, beta2, epsilon, weight_decay } => {
            (learning_rate, None, beta1, beta2, epsilon, weight_decay)
        }
        OptimizerSpec::Muon { learning_rate, momentum, beta1, beta2, epsilon, weight_decay } => {
            (learning_rate, Some(momentum), beta1, beta2, epsilon, weight_decay)
        }
    };
    rules.number(&path("learning_rate"), learning_rate, learning_rate > 0.0, "a positive number");
    let decays = [("momentum", momentum), ("beta1", Some(beta1)), ("beta2", Some(beta2))];
    for (key, decay) in decays {
        let Some(decay) = decay else { continue };
        rules.number(&path(key), decay, (0.0..1.0).contains(&decay), "0 or more, below 1");
    }
    rules.number(&path("epsilon"), epsilon, epsilon > 0.0, "a positive number");
    rules.number(&path("weight_decay"), weight_decay, weight_decay >= 0.0, "0 or a positive number");
}

fn schedule(rules: &mut Rules<'_>, schedule: &Schedule, run_steps: u64) {
    let path = |key: &str| format!("training.schedule.{key}");
    let total_steps = schedule.total_steps();
    let total = total_steps.unwrap_or(run_steps);
    // What the total follows from: a key of its own, or the length of the run.
    let (total_path, named) = match total_steps {
        Some(_) => ([path("total_steps"), path("total_steps")], "total_steps"),
        None => (["rounds".to_owned(), "training.local_steps".to_owned()], "the run's steps"),
    };
    // A phase must fit into what those before it leave.
    let mut before: Vec<String> = total_path.to_vec();
    let mut phase = |rules: &mut Rules<'_>, key: &str, steps: u64, least: u64, taken: u64, left: &str| {
        let room = total.saturating_sub(taken);
        let paths = [&[path(key)], before.as_slice()].concat();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let holds = steps >= least && (steps <= room || taken > total);
        rules.check(&paths, holds, || format!("is {steps}; allowed: {least} to {left}{named}, {room}"));
        before.push(path(key));
    };
    let (warmup_steps, warmup_from) = schedule.warmup();
    phase(rules, "warmup_steps", warmup_steps, 0, 0, "");
    let mut fractions = vec![("warmup_from", warmup_from)];
    match *schedule {
        Schedule::Constant { fraction, .. } => fractions.push(("fraction", fraction)),
        Schedule::Cosine { final_fraction, .. } => fractions.push(("final_fraction", final_fraction)),
        Schedule::WarmupStableDecay { decay_steps, final_fraction, .. } => {
            phase(rules, "decay_steps", decay_steps, 1, warmup_steps, "what the warm-up leaves of ");
            fractions.push(("final_fraction", final_fraction));
        }
        Schedule::Infinite { cooldown_steps, constant_fraction, annealing_steps, final_fraction, .. } => {
            phase(rules, "cooldown_steps", cooldown_steps, 0, warmup_steps, "what the warm-up leaves of ");
            let taken = warmup_steps.saturating_add(cooldown_steps);
            let left = "what warm-up and cool-down leave of ";
            phase(rules, "annealing_steps", annealing_steps, 0, taken, left);
            let holds = 0.0 < constant_fraction && constant_fraction <= 1.0;
            rules.number(&path("constant_fraction"), constant_fraction, holds, "above 0, up to 1");
            // Annealing is geometric: it never comes to 0.
            let paths = [path("final_fraction"), path("constant_fraction")];
            let falls = 0.0 < final_fraction && (final_fraction <= constant_fraction || !holds);
            rules.check(&[&paths[0], &paths[1]], falls, || {
                format!(
                    "is {final_fraction}; allowed: above 0, up to constant_fraction = {constant_fraction}"
                )
            });
        }
    }
    for (key, fraction) in fractions {
        rules.number(&path(key), fraction, (0.0..=1.0).contains(&fraction), "0 to 1");
    }
}

fn tokens(rules: &mut Rules<'_>, spec: &RunSpec) {
    let training = &spec.training;
    let tokens = [training.local_steps, training.batch_size, training.sequence_length]
        .into_iter()
        .fold(u64::from(spec.rounds), |product, factor| product.saturating_mul(u64::from(factor)));
    let paths = ["training", "rounds"];
    rules.check(&paths, tokens <= TOKENS_PER_SITE_MAX, || {
        format!(
            "gives {} tokens per site (rounds x local_steps x batch_size x sequence_length); allowed: up to {}",
            units::count(tokens),
            units::count(TOKENS_PER_SITE_MAX)
        )
    });
}

fn outer(rules: &mut Rules<'_>, optimizer: &OuterOptimizer) {
    let mut positive = |key: &str, value: f64| {
        rules.number(&format!("outer.optimizer.{key}"), value, value > 0.0, "a positive number");
    };
    let decays = match *optimizer {
        OuterOptimizer::FedAvg {} => Vec::new(),
        OuterOptimizer::Sgd { learning_rate, momentum }
        | OuterOptimizer::Nesterov { learning_rate, momentum } => {
            positive("learning_rate", learning_rate);
            vec![("momentum", momentum)]
        }
        OuterOptimizer::FedAdam { learning_rate, beta1, beta2, tau }
        | OuterOptimizer::FedYogi { learning_rate, beta1, beta2, tau } => {
            positive("learning_rate", learning_rate);
            positive("tau", tau);
            vec![("beta1", beta1), ("beta2", beta2)]
        }
    };
    for (key, decay) in decays {
        let holds = (0.0..1.0).contains(&decay);
        rules.number(&format!("outer.optimizer.{key}"), decay, holds, "0 or more, below 1");
    }
}

fn aggregation(rules: &mut Rules<'_>, rule: &Aggregation, participation: &ParticipationSpec) {
    let (deltas, key) = aggregation::deltas_min(participation);
    let given = format!("participation.{key}");
    let ends = format!("a round may end with {deltas} (participation.{key})");
    let path = |key: &str| format!("outer.aggregation.{key}");
    match *rule {
        Aggregation::Mean {} | Aggregation::Median {} => {}
        Aggregation::ClippedMean { factor } => {
            rules.number(&path("factor"), factor, factor > 0.0, "a positive number");
        }
        Aggregation::TrimmedMean { fraction } => {
            let in_range = fraction > 0.0 && fraction < 0.5;
            rules.number(&path("fraction"), fraction, in_range, "above 0, below 0.5");
            let trims = !in_range || deltas < 3 || rule.trimmed(deltas as usize) > Some(0);
            rules.check(&[&path("fraction"), &given], trims, || {
                format!(
                    "is {fraction}, which is no whole delta, and {ends}; allowed then: 1/{deltas} or more"
                )
            });
        }
        Aggregation::Krum { hostile } | Aggregation::MultiKrum { hostile, .. } => {
            let most = deltas.saturating_sub(3) / 2;
            rules.check(&[&path("hostile"), &given], deltas < 3 || hostile <= most, || {
                let needed = rule.deltas_min();
                format!("is {hostile}, for which it takes 2 x {hostile} + 3 = {needed} deltas, but {ends}; allowed then: 0 to {most}")
            });
        }
    }
    if let Aggregation::MultiKrum { hostile, selected } = *rule {
        let most = deltas.saturating_sub(hostile);
        rules.check(&[&path("selected"), &path("hostile"), &given], selected <= most, || {
            format!("is {selected}, but {ends}, of which {hostile} may be hostile; allowed then: 0 (the number of deltas less hostile and 2) to {most}")
        });
    }
    let enough = matches!(rule, Aggregation::Mean {}) || deltas >= 3;
    rules.check(&[&path("kind"), &given], enough, || {
        format!(
            "is \"{}\", but {ends}, which tell nothing of each other; allowed then: \"mean\"",
            rule.name()
        )
    });
}

fn streaming(rules: &mut Rules<'_>, spec: &RunSpec) {
    let Some(StreamingSpec { fragments, overlap, mixing }) = spec.outer.streaming else { return };
    let path = |key: &str| format!("outer.streaming.{key}");
    let chunk = spec.wire.chunk_parameters;
    // What is wrong with these is said elsewhere.
    let cut = chunk > 0 && spec.model.problems().is_empty();
    let chunks = if cut { spec.model.manifest().parameters().div_ceil(u64::from(chunk)) } else { 0 };
    let holds = fragments > 0 && (chunks == 0 || u64::from(fragments) <= chunks);
    rules.check(&[&path("fragments"), "wire.chunk_parameters", "model"], holds, || {
        format!("is {fragments}; allowed: 1 to the number of the model's chunks of wire.chunk_parameters, {chunks}")
    });
    let (steps, named) = match spec.participation.minimum_steps {
        0 => (spec.training.local_steps, "training.local_steps"),
        steps => (steps, "participation.minimum_steps"),
    };
    let others = ["training.local_steps", "participation.minimum_steps"];
    rules.check(&[&path("overlap"), others[0], others[1]], overlap < steps, || {
        format!("is {overlap}; allowed: 0 (sites wait for each fragment), or below {named} = {steps}")
    });
    rules.number(&path("mixing"), mixing, (0.0..1.0).contains(&mixing), "0 or more, below 1");
    let late = spec.participation.staleness_max;
    rules.check(&["participation.staleness_max", "outer.streaming"], late == 0, || {
        format!("is {late}, but a late delta is of another fragment than the next round's; allowed with outer.streaming: 0")
    });
}

fn participation(rules: &mut Rules<'_>, participation: &ParticipationSpec, local_steps: u32) {
    let ParticipationSpec {
        minimum_clients,
        clients_per_round,
        sampling,
        over_selection,
        minimum_steps,
        quorum,
        deadline_seconds,
        ref adaptive_deadline,
        staleness_max,
        staleness_exponent,
        buffer,
    } = *participation;
    let is_known = staleness_max <= STALENESS_MAX;
    rules.check(&["participation.staleness_max"], is_known, || {
        format!("is {staleness_max}; allowed: 0 (late deltas are dropped) to {STALENESS_MAX}")
    });
    let path = "participation.staleness_exponent";
    let holds = (0.0..=STALENESS_EXPONENT_MAX).contains(&staleness_exponent);
    rules.number(path, staleness_exponent, holds, "0 to 100");
    if buffer > 0 {
        buffered(rules, participation);
    }
    rules.check(&["participation.minimum_clients"], (1..=CLIENTS_MAX).contains(&minimum_clients), || {
        format!("is {minimum_clients}; allowed: 1 to {CLIENTS_MAX}")
    });
    rules.check(&["participation.clients_per_round"], clients_per_round <= CLIENTS_MAX, || {
        format!("is {clients_per_round}; allowed: 0 (all that are ready) to {CLIENTS_MAX}")
    });
    let draws = clients_per_round > 0 || sampling == Sampling::Uniform;
    rules.check(&["participation.sampling", "participation.clients_per_round"], draws, || {
        "is \"tokens\", but with participation.clients_per_round = 0 all sites take part and none are drawn; \
         allowed then: \"uniform\""
            .to_owned()
    });
    let paths = ["participation.over_selection", "participation.clients_per_round"];
    let room = if clients_per_round == 0 { 0 } else { CLIENTS_MAX.saturating_sub(clients_per_round) };
    rules.check(&paths, over_selection <= room, || match clients_per_round {
        0 => format!("is {over_selection}, but with participation.clients_per_round = 0 all sites are selected; allowed then: 0"),
        _ => format!("is {over_selection}; allowed: 0 to {room}, for {CLIENTS_MAX} sites in all"),
    });
    let paths = ["participation.minimum_steps", "training.local_steps"];
    rules.check(&paths, minimum_steps <= local_steps, || {
        format!(
            "is {minimum_steps}; allowed: 0 (no site takes fewer) to training.local_steps = {local_steps}"
        )
    });
    let selected = clients_per_round == 0 || quorum <= clients_per_round;
    rules.check(&["participation.quorum", "participation.clients_per_round"], selected, || {
        format!("is {quorum}; allowed: 0 to participation.clients_per_round = {clients_per_round}")
    });
    rules.check(&["participation.quorum", "participation.minimum_clients"], quorum <= minimum_clients, || {
        format!("is {quorum}; allowed: 0 to participation.minimum_clients = {minimum_clients}, with which a round begins")
    });
    rules.check(&["participation.deadline_seconds"], deadline_seconds <= DEADLINE_SECONDS_MAX, || {
        format!("is {deadline_seconds}; allowed: 0 (none) to {DEADLINE_SECONDS_MAX}")
    });
    if let Some(AdaptiveDeadline { deviations, minimum_seconds }) = *adaptive_deadline {
        let path = "participation.adaptive_deadline.deviations";
        let holds = (0.0..=DEVIATIONS_MAX).contains(&deviations);
        rules.number(path, deviations, holds, "0 to 1000");
        let path = "participation.adaptive_deadline.minimum_seconds";
        let (most, named) = match deadline_seconds {
            0 => (DEADLINE_SECONDS_MAX, String::new()),
            fixed => (fixed, " = participation.deadline_seconds, beyond which no round lasts".to_owned()),
        };
        let holds = (1..=most).contains(&minimum_seconds);
        rules.check(&[path, "participation.deadline_seconds"], holds, || {
            format!("is {minimum_seconds}; allowed: 1 to {most}{named}")
        });
    }
}

/// What a buffer excludes, because its rounds end in one way only, and what it needs.
fn buffered(rules: &mut Rules<'_>, participation: &ParticipationSpec) {
    let ParticipationSpec { minimum_clients, buffer, staleness_max, .. } = *participation;
    let paths = ["participation.buffer", "participation.minimum_clients"];
    rules.check(&paths, buffer < minimum_clients, || {
        format!("is {buffer}; allowed: 0 (rounds are synchronous), or below participation.minimum_clients = {minimum_clients}, so that it fills when a site is gone, too")
    });
    rules.check(&["participation.staleness_max", "participation.buffer"], staleness_max > 0, || {
        format!("is 0, with which only the fastest sites would count in a buffer; allowed with participation.buffer = {buffer}: 1 to {STALENESS_MAX}")
    });
    let others = [
        ("clients_per_round", u64::from(participation.clients_per_round)),
        ("over_selection", u64::from(participation.over_selection)),
        ("quorum", u64::from(participation.quorum)),
        ("deadline_seconds", participation.deadline_seconds),
    ];
    for (key, value) in others {
        let path = format!("participation.{key}");
        rules.check(&[&path, "participation.buffer"], value == 0, || {
            format!("is {value}; allowed with participation.buffer = {buffer}, which alone ends a round: 0")
        });
    }
    let path = "participation.adaptive_deadline";
    rules.check(&[path, "participation.buffer"], participation.adaptive_deadline.is_none(), || {
        format!("is there; not allowed with participation.buffer = {buffer}, which alone ends a round")
    });
}

fn evaluation(rules: &mut Rules<'_>, evaluation: &EvaluationSpec) {
    let EvaluationSpec { held_out_fraction, tokens_max, every_rounds } = *evaluation;
    let in_range = (0.0..=HELD_OUT_FRACTION_MAX).contains(&held_out_fraction);
    if every_rounds == 0 {
        rules.number("evaluation.held_out_fraction", held_out_fraction, in_range, "0 to 0.5");
        return;
    }
    let holds = in_range && held_out_fraction > 0.0;
    rules.number("evaluation.held_out_fraction", held_out_fraction, holds, "above 0, up to 0.5");
    rules.check(&["evaluation.tokens_max"], (1..=EVALUATION_TOKENS_MAX).contains(&tokens_max), || {
        format!("is {tokens_max}; allowed: 1 to {EVALUATION_TOKENS_MAX}")
    });
}

fn checkpoints(rules: &mut Rules<'_>, checkpoints: &CheckpointSpec) {
    for (key, value) in [("every_rounds", checkpoints.every_rounds), ("keep", checkpoints.keep)] {
        rules.check(&[&format!("checkpoints.{key}")], value <= ROUNDS_MAX, || {
            format!("is {value}; allowed: 0 to {ROUNDS_MAX}")
        });
    }
}
