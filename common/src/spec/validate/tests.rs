//! What a reader of the error sees.

use proptest::prelude::*;

use super::*;

const LEAST: &str = "name = \"a\"\nrounds = 10\nmodel.architecture = \"llama\"\n";

/// The problems of a specification, one line each.
fn problems(text: &str) -> Vec<String> {
    match RunSpec::parse(text) {
        Ok(_) => Vec::new(),
        Err(error) => error.problems.iter().map(ToString::to_string).collect(),
    }
}

/// `addition` to the least specification gives exactly `expected`.
#[track_caller]
fn check(addition: &str, expected: &[&str]) {
    assert_eq!(problems(&format!("{LEAST}{addition}")), expected, "{addition}");
}

#[test]
fn every_mistake_is_listed_at_once() {
    let text = r#"
        name = "Not A Name"
        sed = 3
        rounds = "many"

        [model]
        architecture = "llama"
        hidden_sise = 64
        num_attention_heads = 3
        vocab_size = 100

        [tokenizer]
        kind = "byte"
        path = "tokenizer.json"

        [training]
        local_steps = -1
        batch_size = 12
        micro_batch_size = 5
        sequence_length = 4096
        gradient_clip = nan

        [training.optimizer]
        kind = "adamw"
        learning_rate = "fast"
        beta1 = 1.0
        beta3 = 0.9

        [training.schedule]
        kind = "warmup-stable-decay"
        warmup_steps = 5

        [outer]
        optimizer = { kind = "fedavg", momentum = 0.5 }
        weighting = "token"

        [participation]
        minimum_clients = 2
        clients_per_round = 3
        quorum = 4

        [wire]
        delta_encoding = 16
        model_encoding = "int8"
        chunk_parameters = 100

        [evaluation]
        held_out_fraction = 0.9

        [checkpoint]
        keep = 1
    "#;
    let expected = r#"
name "Not A Name" is not a name; allowed: 1 to 40 of a-z, 0-9 and '-', beginning and ending with a letter or digit
rounds is "many"; allowed: a whole number from 0 to 4294967295
model.hidden_sise is not a known key; did you mean `hidden_size`?
model.num_attention_heads is 3; must divide hidden_size = 128
model.num_key_value_heads is 2; must divide num_attention_heads = 3
model.vocab_size is 100; allowed with the byte tokenizer: 257 or more
tokenizer.path is not a known key; none is allowed here
training.local_steps is -1; allowed: a whole number from 0 to 4294967295
training.optimizer.beta3 is not a known key; did you mean `beta2`?
training.optimizer.learning_rate is "fast"; allowed: a number
training.schedule.decay_steps is missing; allowed: a whole number, 0 or more
training.micro_batch_size is 5; allowed: 0, or what divides training.batch_size = 12
training.sequence_length is 4096; allowed: 1 to the model's context length, 256
training.gradient_clip is NaN; allowed: 0 (never), or a positive number
training.optimizer.beta1 is 1; allowed: 0 or more, below 1
outer.optimizer.momentum is not a known key; none is allowed here
outer.weighting is "token"; allowed: "tokens", "uniform"
participation.quorum is 4; allowed: 0 to participation.clients_per_round = 3
participation.quorum is 4; allowed: 0 to participation.minimum_clients = 2, with which a round begins
wire.delta_encoding is 16; allowed: "fp32", "bf16", "fp16", "int8", "e3m0", "2bit", "topk"
wire.model_encoding is "int8"; allowed: "fp32", "bf16", or a delta encoding followed by "-update", as in "bf16-update"
wire.chunk_parameters is 100; allowed: 1024 to 1048576
evaluation.held_out_fraction is 0.9; allowed: above 0, up to 0.5
checkpoint is not a known key; did you mean `checkpoints`?
sed is not a known key; did you mean `seed`?
"#;
    let actual = problems(text);
    assert_eq!(actual.join("\n"), expected.trim());
}

#[test]
fn the_least_specification_is_valid() {
    check("", &[]);
}

#[test]
fn missing_keys_say_what_is_allowed() {
    assert_eq!(
        problems(""),
        [
            "name is missing; allowed: 1 to 40 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
            "rounds is missing; allowed: a whole number from 0 to 4294967295",
            "model is missing; allowed: a table",
        ]
    );
    check(
        "training.schedule.warmup_steps = 3",
        &[
            r#"training.schedule.kind is missing; allowed: "constant", "cosine", "warmup-stable-decay", "infinite""#,
        ],
    );
    check(
        "tokenizer.kind = \"file\"",
        &[
            "tokenizer.path is missing; allowed: a string",
            "tokenizer.end_of_text is missing; allowed: a string",
        ],
    );
    check(
        "outer.optimizer = {}",
        &[r#"outer.optimizer.kind is missing; allowed: "fedavg", "sgd", "nesterov", "fedadam", "fedyogi""#],
    );
    check(
        "training.schedule.kind = \"warmup-stable-decay\"",
        &["training.schedule.decay_steps is missing; allowed: a whole number, 0 or more"],
    );
}

#[test]
fn unknown_variants_list_the_known() {
    check(
        "training.optimizer.kind = \"adam\"",
        &[r#"training.optimizer.kind is "adam"; allowed: "adamw", "adopt", "muon""#],
    );
    check(
        "training.optimizer = { kind = \"muon\", momentum = 1 }",
        &["training.optimizer.momentum is 1; allowed: 0 or more, below 1"],
    );
    check("training.precision = \"fp16\"", &[r#"training.precision is "fp16"; allowed: "fp32", "bf16""#]);
    assert_eq!(
        problems("name = \"a\"\nrounds = 1\nmodel = { architecture = \"mamba\", d_state = 3 }"),
        [r#"model.architecture is "mamba"; allowed: "llama", "gpt2", "mpt""#]
    );
    check(
        "training.optimizer_state = \"forget\"",
        &[r#"training.optimizer_state is "forget"; allowed: "keep", "reset""#],
    );
}

#[test]
fn outer_optimizers_say_what_their_numbers_may_be() {
    for kind in ["fedadam", "fedyogi"] {
        check(
            &format!(
                "outer.optimizer = {{ kind = \"{kind}\", learning_rate = 0.0, beta1 = 1.0, beta2 = -0.1, tau = 0.0 }}"
            ),
            &[
                "outer.optimizer.learning_rate is 0; allowed: a positive number",
                "outer.optimizer.tau is 0; allowed: a positive number",
                "outer.optimizer.beta1 is 1; allowed: 0 or more, below 1",
                "outer.optimizer.beta2 is -0.1; allowed: 0 or more, below 1",
            ],
        );
    }
    check(
        "outer.optimizer = { kind = \"sgd\", momentum = 1.5 }",
        &["outer.optimizer.momentum is 1.5; allowed: 0 or more, below 1"],
    );
}

#[test]
fn aggregation_rules_ask_for_enough_sites() {
    check(
        "outer.aggregation.kind = \"mode\"",
        &[
            r#"outer.aggregation.kind is "mode"; allowed: "mean", "clipped-mean", "trimmed-mean", "median", "krum", "multi-krum""#,
        ],
    );
    check(
        "outer.aggregation.kind = \"median\"",
        &[
            r#"outer.aggregation.kind is "median", but a round may end with 1 (participation.minimum_clients), which tell nothing of each other; allowed then: "mean""#,
        ],
    );
    check("outer.aggregation.kind = \"median\"\nparticipation.minimum_clients = 3", &[]);
    check(
        "outer.aggregation = { kind = \"clipped-mean\", factor = 0.0 }\nparticipation.minimum_clients = 3",
        &["outer.aggregation.factor is 0; allowed: a positive number"],
    );
    for (fraction, shown) in [("0.5", "0.5"), ("0.0", "0"), ("nan", "NaN")] {
        check(
            &format!(
                "outer.aggregation = {{ kind = \"trimmed-mean\", fraction = {fraction} }}\nparticipation.minimum_clients = 4"
            ),
            &[&format!("outer.aggregation.fraction is {shown}; allowed: above 0, below 0.5")],
        );
    }
    check(
        "outer.aggregation.kind = \"trimmed-mean\"\nparticipation = { minimum_clients = 8, quorum = 3 }",
        &[
            "outer.aggregation.fraction is 0.25, which is no whole delta, and a round may end with 3 (participation.quorum); allowed then: 1/3 or more",
        ],
    );
    check(
        "outer.aggregation.kind = \"krum\"\nparticipation = { minimum_clients = 8, clients_per_round = 4 }",
        &[
            "outer.aggregation.hostile is 1, for which it takes 2 x 1 + 3 = 5 deltas, but a round may end with 4 (participation.clients_per_round); allowed then: 0 to 0",
        ],
    );
    check(
        "outer.aggregation = { kind = \"multi-krum\", hostile = 2, selected = 6 }\nparticipation.minimum_clients = 7",
        &[
            "outer.aggregation.selected is 6, but a round may end with 7 (participation.minimum_clients), of which 2 may be hostile; allowed then: 0 (the number of deltas less hostile and 2) to 5",
        ],
    );
    check("outer.aggregation = { kind = \"multi-krum\" }\nparticipation.minimum_clients = 5", &[]);
    check(
        "outer.aggregation.kind = \"median\"\nparticipation = { minimum_clients = 4, buffer = 2, staleness_max = 2 }",
        &[
            r#"outer.aggregation.kind is "median", but a round may end with 2 (participation.buffer), which tell nothing of each other; allowed then: "mean""#,
        ],
    );
}

#[test]
fn streaming_fits_the_model_and_the_steps() {
    check("outer.streaming = {}", &[]);
    check(
        "outer.streaming = { fragments = 4, overlap = 100, mixing = 1.0 }",
        &[
            "outer.streaming.fragments is 4; allowed: 1 to the number of the model's chunks of wire.chunk_parameters, 3",
            "outer.streaming.overlap is 100; allowed: 0 (sites wait for each fragment), or below training.local_steps = 100",
            "outer.streaming.mixing is 1; allowed: 0 or more, below 1",
        ],
    );
    check("outer.streaming = { fragments = 4 }\nwire.chunk_parameters = 100000", &[]);
    check(
        "outer.streaming = {}\nparticipation.staleness_max = 2",
        &[
            "participation.staleness_max is 2, but a late delta is of another fragment than the next round's; allowed with outer.streaming: 0",
        ],
    );
    check(
        "outer.streaming = { fragments = 0, overlap = 7 }\nparticipation.minimum_steps = 7",
        &[
            "outer.streaming.fragments is 0; allowed: 1 to the number of the model's chunks of wire.chunk_parameters, 3",
            "outer.streaming.overlap is 7; allowed: 0 (sites wait for each fragment), or below participation.minimum_steps = 7",
        ],
    );
}

#[test]
fn wrong_types_name_both() {
    check("training = 3", &["training is 3; allowed: a table"]);
    check("wire = [1]", &["wire is an array; allowed: a table"]);
    check("outer.optimizer = 3", &["outer.optimizer is 3; allowed: a table"]);
    check(
        "training.schedule = { kind = 3 }",
        &[r#"training.schedule.kind is 3; allowed: "constant", "cosine", "warmup-stable-decay", "infinite""#],
    );
    check(
        "evaluation.every_rounds = 1.5",
        &["evaluation.every_rounds is 1.5; allowed: a whole number from 0 to 4294967295"],
    );
    check(
        "training.batch_size = 99999999999",
        &["training.batch_size is 99999999999; allowed: a whole number from 0 to 4294967295"],
    );
    check(
        "training.optimizer = { kind = \"adamw\", beta1 = \"0.9\", beta2 = true }",
        &[
            r#"training.optimizer.beta1 is "0.9"; allowed: a number"#,
            "training.optimizer.beta2 is true; allowed: a number",
        ],
    );
}

#[test]
fn whole_numbers_serve_as_numbers() {
    check("training = { gradient_clip = 1, optimizer = { kind = \"adamw\", learning_rate = 1 } }", &[]);
}

#[test]
fn keys_that_must_fit_each_other_are_checked_together() {
    check("training = { batch_size = 12, micro_batch_size = 4 }", &[]);
    check(
        "training = { batch_size = 12, micro_batch_size = 5 }",
        &["training.micro_batch_size is 5; allowed: 0, or what divides training.batch_size = 12"],
    );
    check(
        "participation = { minimum_clients = 2, quorum = 3 }",
        &[
            "participation.quorum is 3; allowed: 0 to participation.minimum_clients = 2, with which a round begins",
        ],
    );
    check(
        "participation = { minimum_clients = 4, clients_per_round = 2, quorum = 3 }",
        &["participation.quorum is 3; allowed: 0 to participation.clients_per_round = 2"],
    );
    check("participation = { clients_per_round = 3, sampling = \"tokens\" }", &[]);
    check(
        "participation.sampling = \"tokens\"",
        &[
            "participation.sampling is \"tokens\", but with participation.clients_per_round = 0 all sites take part and none are drawn; allowed then: \"uniform\"",
        ],
    );
    check(
        "participation = { clients_per_round = 3, sampling = \"size\" }",
        &[r#"participation.sampling is "size"; allowed: "uniform", "tokens""#],
    );
    check("participation = { clients_per_round = 3, over_selection = 1 }", &[]);
    check(
        "participation.over_selection = 1",
        &[
            "participation.over_selection is 1, but with participation.clients_per_round = 0 all sites are selected; allowed then: 0",
        ],
    );
    check(
        "participation = { clients_per_round = 4000, over_selection = 97 }",
        &["participation.over_selection is 97; allowed: 0 to 96, for 4096 sites in all"],
    );
    check("participation.adaptive_deadline = {}", &[]);
    check(
        "participation.adaptive_deadline = { deviations = -1.0, minimum_seconds = 0 }",
        &[
            "participation.adaptive_deadline.deviations is -1; allowed: 0 to 1000",
            "participation.adaptive_deadline.minimum_seconds is 0; allowed: 1 to 7776000",
        ],
    );
    check(
        "participation = { deadline_seconds = 50, adaptive_deadline = {} }",
        &[
            "participation.adaptive_deadline.minimum_seconds is 60; allowed: 1 to 50 = participation.deadline_seconds, beyond which no round lasts",
        ],
    );
    check("participation = { staleness_max = 64, staleness_exponent = 0.0 }", &[]);
    check(
        "participation = { staleness_max = 65, staleness_exponent = -0.5 }",
        &[
            "participation.staleness_max is 65; allowed: 0 (late deltas are dropped) to 64",
            "participation.staleness_exponent is -0.5; allowed: 0 to 100",
        ],
    );
    check("participation = { minimum_clients = 3, buffer = 2, staleness_max = 4, minimum_steps = 1 }", &[]);
    check(
        "participation = { minimum_clients = 3, buffer = 3, staleness_max = 4 }",
        &[
            "participation.buffer is 3; allowed: 0 (rounds are synchronous), or below participation.minimum_clients = 3, so that it fills when a site is gone, too",
        ],
    );
    check(
        "participation = { minimum_clients = 3, buffer = 4, clients_per_round = 3, quorum = 2, deadline_seconds = 60, adaptive_deadline = {} }",
        &[
            "participation.buffer is 4; allowed: 0 (rounds are synchronous), or below participation.minimum_clients = 3, so that it fills when a site is gone, too",
            "participation.staleness_max is 0, with which only the fastest sites would count in a buffer; allowed with participation.buffer = 4: 1 to 64",
            "participation.clients_per_round is 3; allowed with participation.buffer = 4, which alone ends a round: 0",
            "participation.quorum is 2; allowed with participation.buffer = 4, which alone ends a round: 0",
            "participation.deadline_seconds is 60; allowed with participation.buffer = 4, which alone ends a round: 0",
            "participation.adaptive_deadline is there; not allowed with participation.buffer = 4, which alone ends a round",
        ],
    );
    check("participation = { minimum_steps = 100 }", &[]);
    check(
        "participation = { minimum_steps = 101 }",
        &[
            "participation.minimum_steps is 101; allowed: 0 (no site takes fewer) to training.local_steps = 100",
        ],
    );
    check("evaluation = { every_rounds = 0, held_out_fraction = 0.0, tokens_max = 0 }", &[]);
    check(
        "evaluation.held_out_fraction = 0.0",
        &["evaluation.held_out_fraction is 0; allowed: above 0, up to 0.5"],
    );
}

#[test]
fn a_schedule_is_judged_for_another_number_of_steps() {
    let spec = |schedule| RunSpec::parse(&format!("{LEAST}training.schedule = {schedule}\n")).unwrap();
    let decay = spec("{ kind = \"warmup-stable-decay\", warmup_steps = 60, decay_steps = 50 }");
    let problems = |steps| decay.schedule_problems(steps).iter().map(ToString::to_string).collect::<Vec<_>>();
    assert!(problems(110).is_empty());
    let expected =
        "training.schedule.decay_steps is 50; allowed: 1 to what the warm-up leaves of the run's steps, 49";
    assert_eq!(problems(109), [expected]);
    let own = spec("{ kind = \"cosine\", warmup_steps = 60, total_steps = 100 }");
    assert!(own.schedule_problems(1).is_empty(), "it has a length of its own");
}

#[test]
fn a_schedule_fits_into_its_steps() {
    check(
        "training.schedule = { kind = \"constant\", warmup_steps = 1001 }",
        &["training.schedule.warmup_steps is 1001; allowed: 0 to the run's steps, 1000"],
    );
    check(
        "training.schedule = { kind = \"cosine\", warmup_steps = 51, total_steps = 50 }",
        &["training.schedule.warmup_steps is 51; allowed: 0 to total_steps, 50"],
    );
    check(
        "training.schedule = { kind = \"warmup-stable-decay\", warmup_steps = 600, decay_steps = 500 }",
        &[
            "training.schedule.decay_steps is 500; allowed: 1 to what the warm-up leaves of the run's steps, 400",
        ],
    );
    check(
        "training.schedule = { kind = \"warmup-stable-decay\", warmup_steps = 600, decay_steps = 400 }",
        &[],
    );
    check(
        "training.schedule = { kind = \"infinite\", warmup_steps = 100, cooldown_steps = 600, annealing_steps = 301 }",
        &[
            "training.schedule.annealing_steps is 301; allowed: 0 to what warm-up and cool-down leave of the run's steps, 300",
        ],
    );
    check(
        "training.schedule = { kind = \"infinite\", warmup_steps = 100, cooldown_steps = 600, annealing_steps = 300 }",
        &[],
    );
    check(
        "training.schedule = { kind = \"infinite\", warmup_steps = 9, cooldown_steps = 2, total_steps = 10 }",
        &["training.schedule.cooldown_steps is 2; allowed: 0 to what the warm-up leaves of total_steps, 1"],
    );
}

#[test]
fn fractions_of_the_peak_rate_are_fractions() {
    check(
        "training.schedule = { kind = \"constant\", warmup_from = 1.5, fraction = -0.1 }",
        &[
            "training.schedule.warmup_from is 1.5; allowed: 0 to 1",
            "training.schedule.fraction is -0.1; allowed: 0 to 1",
        ],
    );
    check(
        "training.schedule = { kind = \"infinite\", constant_fraction = 0 }",
        &["training.schedule.constant_fraction is 0; allowed: above 0, up to 1"],
    );
    for (fraction, shown) in [("0.0", "0"), ("0.6", "0.6"), ("nan", "NaN")] {
        let problem = format!(
            "training.schedule.final_fraction is {shown}; allowed: above 0, up to constant_fraction = 0.55"
        );
        check(
            &format!("training.schedule = {{ kind = \"infinite\", final_fraction = {fraction} }}"),
            &[&problem],
        );
    }
}

#[test]
fn models_beyond_what_can_be_run_are_refused() {
    let model =
        |keys: &str| format!("name = \"a\"\nrounds = 10\nmodel = {{ architecture = \"gpt2\", {keys} }}\n");
    assert_eq!(
        problems(&model("n_embd = 65536, n_layer = 256")),
        ["model has 13.2T parameters; allowed: up to 100B"]
    );
    assert_eq!(
        problems(&(model("n_embd = 4096, n_layer = 32") + "wire.chunk_parameters = 1024")),
        [
            "wire.chunk_parameters is 1024, which cuts the model into 6295180 chunks; allowed for its 6446264320 parameters: 49182 or more"
        ]
    );
    assert_eq!(
        problems(&model("vocab_size = 256")),
        ["model.vocab_size is 256; allowed with the byte tokenizer: 257 or more"]
    );
}

#[test]
fn a_run_beyond_counting_is_refused() {
    let text = "name = \"a\"\nrounds = 1000000\nmodel.architecture = \"llama\"\n\
        training = { local_steps = 1000000, batch_size = 65536, sequence_length = 256 }";
    assert_eq!(
        problems(text),
        [
            "training gives 16777216T tokens per site (rounds x local_steps x batch_size x sequence_length); allowed: up to 1000T"
        ]
    );
}

#[test]
fn rules_are_not_applied_to_what_was_misspelt() {
    check(
        "training = { batch_size = \"12\", micro_batch_size = 5 }",
        &[r#"training.batch_size is "12"; allowed: a whole number from 0 to 4294967295"#],
    );
}

#[test]
fn what_is_not_toml_is_told_with_its_place() {
    check("training = [", &["line 4, column 13: not TOML: unclosed array, expected `]`"]);
    check("rounds = 3", &["line 4, column 1: not TOML: duplicate key"]);
    check(
        "é = é",
        &["line 4, column 1: not TOML: invalid unquoted key, expected letters, numbers, `-`, `_`"],
    );
}

#[test]
fn a_specification_beyond_the_limit_is_refused_unread() {
    assert_eq!(
        problems(&" ".repeat(SPEC_BYTES_MAX + 1)),
        ["the specification has 1048577 bytes; allowed: 1048576"]
    );
}

#[test]
fn a_flood_of_problems_is_cut() {
    let flood: String = (0..500).map(|index| format!("key{index} = 1\n")).collect();
    let problems = problems(&flood);
    assert_eq!(problems.len(), 101);
    assert_eq!(problems[100], "more than 100 problems: the others are not listed");
}

#[test]
fn an_error_reads_as_a_list() {
    let error = RunSpec::parse("name = \"a\"\nmodel.architecture = \"llama\"").unwrap_err();
    assert_eq!(
        error.to_string(),
        "the specification has a problem:\n  rounds is missing; allowed: a whole number from 0 to 4294967295"
    );
}

#[test]
fn nesting_without_end_is_refused() {
    for text in [
        "a.".repeat(400_000) + "a = 1",
        "a = ".to_owned() + &"[".repeat(500_000),
        format!("[{}a]", "a.".repeat(400_000)),
        "{a=".repeat(200_000),
    ] {
        assert!(RunSpec::parse(&text).is_err());
    }
}

#[test]
fn very_many_keys_are_refused_before_they_are_judged() {
    let keys: String = (0..2_000).map(|index| format!("z{index} = 1\n")).collect();
    check(&format!("[training.optimizer]\n{keys}"), &["the specification has 2006 keys; allowed: 1000"]);
}

/// The reference with one line changed.
fn mutation() -> impl Strategy<Value = String> {
    let lines: Vec<&str> = RunSpec::reference().lines().collect();
    let value = prop_oneof![
        "[ -~]{0,12}",
        any::<i64>().prop_map(|value| value.to_string()),
        any::<f64>().prop_map(|value| format!("{value:?}")),
        prop::sample::select(vec![
            "\"\"",
            "[]",
            "{}",
            "true",
            "1979-05-27",
            "nan",
            "-inf",
            "{ kind = \"byte\" }"
        ])
        .prop_map(str::to_owned),
    ];
    (prop::collection::vec((0..lines.len(), value, 0..4u8), 1..5)).prop_map(move |changes| {
        let mut lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        for (index, value, kind) in changes {
            let key = lines[index].split('=').next().unwrap_or_default().to_owned();
            lines[index] = match kind {
                0 => String::new(),
                1 => value,
                2 => key.trim_start_matches('#').to_owned() + "= " + &value,
                _ => lines[index].trim_start_matches('#').to_owned(),
            };
        }
        lines.join("\n")
    })
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,200}") {
        let _ = RunSpec::parse(&text);
    }

    #[test]
    fn a_changed_reference_is_valid_or_has_problems_with_known_paths(text in mutation()) {
        match RunSpec::parse(&text) {
            Ok(spec) => {
                prop_assert!(spec.chunk_plan().chunks() > 0);
                let written = toml::to_string(&spec).unwrap();
                prop_assert_eq!(RunSpec::parse(&written).unwrap(), spec);
            }
            Err(error) => {
                prop_assert!(!error.problems.is_empty());
                prop_assert!(error.problems.iter().all(|problem| !problem.message.is_empty()));
            }
        }
    }
}

#[test]
fn tables_inside_the_model_are_checked_key_by_key() {
    check(
        "model.rope_scaling = { factor = 0, low_freq_factor = 1.0, high_freq_factor = 1.0, facter = 1 }",
        &[
            "model.rope_scaling.facter is not a known key; did you mean `factor`?",
            "model.rope_scaling.factor is 0; must be a positive number",
            "model.rope_scaling.high_freq_factor is 1; must be above rope_scaling.low_freq_factor = 1",
        ],
    );
    check(
        "model.rope_scaling.rope_type = \"yarn\"",
        &[r#"model.rope_scaling.rope_type is "yarn"; allowed: "llama3""#],
    );
    check("model.rope_scaling = 8", &["model.rope_scaling is 8; allowed: a table"]);
    check(
        "model.head_dim = 33",
        &["model.head_dim gives heads of width 33; rotary positions need an even width"],
    );
}
