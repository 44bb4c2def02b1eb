//! The commented reference of the run specification: hand-written, and held to the code by its tests.

use super::RunSpec;

impl RunSpec {
    /// A complete specification with every key, its default and its meaning, as TOML. Commented-out
    /// lines that begin with `#` and no space are settings; those with a space are prose.
    pub fn reference() -> &'static str {
        include_str!("reference.toml")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        model::{Architecture, Gpt2Config, LlamaConfig, MptAttentionConfig, MptConfig, RopeScaling},
        schedule::Schedule,
        spec::{
            AdaptiveDeadline, Aggregation, OptimizerSpec, OuterOptimizer, OuterSpec, StartSpec,
            StreamingSpec, TokenizerSpec, TrainingSpec,
        },
    };

    /// A section as the reference writes it: active, or commented out as an alternative.
    struct Section {
        name: String,
        active: bool,
        /// Settings, without their `#`, and whether they are active.
        settings: Vec<(String, bool)>,
    }

    impl Section {
        fn new(name: &str, active: bool) -> Self {
            Self { name: name.to_owned(), active, settings: Vec::new() }
        }

        /// As TOML: the active settings and, of the others, the one numbered `uncommented`.
        fn toml(&self, uncommented: Option<usize>) -> String {
            let header = if self.name.is_empty() { String::new() } else { format!("[{}]\n", self.name) };
            let settings = self
                .settings
                .iter()
                .enumerate()
                .filter(|(index, (_, active))| *active || !self.active || Some(*index) == uncommented);
            header + &settings.map(|(_, (text, _))| format!("{text}\n")).collect::<String>()
        }
    }

    fn sections() -> Vec<Section> {
        let mut sections = vec![Section::new("", true)];
        for line in RunSpec::reference().lines() {
            let (text, active) = line.strip_prefix('#').map_or((line, true), |rest| (rest, false));
            if text.is_empty() || text.starts_with(' ') {
                continue;
            }
            match text.strip_prefix('[') {
                Some(name) => sections.push(Section::new(name.trim_end_matches(']'), active)),
                None => sections.last_mut().unwrap().settings.push((text.to_owned(), active)),
            }
        }
        sections
    }

    /// `section.key` of every leaf.
    fn keys(value: &toml::Value, path: &str, keys: &mut BTreeSet<String>) {
        match value {
            toml::Value::Table(table) => {
                for (key, value) in table {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    self::keys(value, &path, keys);
                }
            }
            _ => assert!(keys.insert(path.to_owned()) || !path.is_empty()),
        }
    }

    /// The reference specification with each alternative in turn in place.
    fn all_variants() -> Vec<RunSpec> {
        let reference = RunSpec::parse(RunSpec::reference()).unwrap();
        let with = |change: &dyn Fn(&mut RunSpec)| {
            let mut spec = reference.clone();
            change(&mut spec);
            spec
        };
        vec![
            with(&|spec| {
                spec.model = Architecture::Llama(LlamaConfig {
                    head_dim: Some(32),
                    rope_scaling: Some(RopeScaling::default()),
                    ..LlamaConfig::default()
                });
            }),
            with(&|spec| {
                spec.model = Architecture::Gpt2(Gpt2Config { n_inner: Some(512), ..Gpt2Config::default() });
            }),
            with(&|spec| {
                let attn_config = MptAttentionConfig { clip_qkv: Some(8.0), softmax_scale: Some(0.125) };
                spec.model = Architecture::Mpt(MptConfig { attn_config, ..MptConfig::default() });
            }),
            with(&|spec| spec.tokenizer = TokenizerSpec::Byte {}),
            with(&|spec| spec.tokenizer = TokenizerSpec::File { path: "p".into(), end_of_text: "e".into() }),
            with(&|spec| spec.start = Some(StartSpec { checkpoint: "c".into() })),
            with(&|spec| {
                spec.training.schedule =
                    Schedule::Constant { warmup_steps: 1, warmup_from: 0.0, fraction: 1.0 };
            }),
            with(&|spec| {
                spec.training.schedule = Schedule::Cosine {
                    warmup_steps: 1,
                    warmup_from: 0.0,
                    total_steps: Some(2),
                    final_fraction: 0.0,
                };
            }),
            with(&|spec| {
                spec.training.schedule = Schedule::WarmupStableDecay {
                    warmup_steps: 1,
                    warmup_from: 0.0,
                    decay_steps: 1,
                    total_steps: Some(2),
                    final_fraction: 0.0,
                };
            }),
            with(&|spec| {
                spec.training.schedule = Schedule::Infinite {
                    warmup_steps: 1,
                    warmup_from: 0.0,
                    cooldown_steps: 1,
                    constant_fraction: 0.5,
                    annealing_steps: 1,
                    total_steps: Some(3),
                    final_fraction: 0.1,
                };
            }),
            with(&|spec| {
                spec.training.optimizer = OptimizerSpec::Adopt {
                    learning_rate: 1.0,
                    beta1: 0.0,
                    beta2: 0.0,
                    epsilon: 1.0,
                    weight_decay: 0.0,
                };
            }),
            with(&|spec| {
                spec.training.optimizer = OptimizerSpec::Muon {
                    learning_rate: 1.0,
                    momentum: 0.0,
                    beta1: 0.0,
                    beta2: 0.0,
                    epsilon: 1.0,
                    weight_decay: 0.0,
                };
            }),
            with(&|spec| spec.outer.optimizer = OuterOptimizer::FedAvg {}),
            with(&|spec| spec.outer.optimizer = OuterOptimizer::default()),
            with(&|spec| {
                spec.outer.optimizer = OuterOptimizer::Sgd { learning_rate: 1.0, momentum: 0.5 };
            }),
            with(&|spec| {
                spec.outer.optimizer =
                    OuterOptimizer::FedAdam { learning_rate: 0.1, beta1: 0.9, beta2: 0.9, tau: 0.1 };
            }),
            with(&|spec| {
                spec.outer.optimizer =
                    OuterOptimizer::FedYogi { learning_rate: 0.1, beta1: 0.9, beta2: 0.9, tau: 0.1 };
            }),
            with(&|spec| spec.outer.aggregation = Aggregation::ClippedMean { factor: 2.0 }),
            with(&|spec| spec.outer.aggregation = Aggregation::TrimmedMean { fraction: 0.4 }),
            with(&|spec| spec.outer.aggregation = Aggregation::Median {}),
            with(&|spec| spec.outer.aggregation = Aggregation::Krum { hostile: 1 }),
            with(&|spec| spec.outer.aggregation = Aggregation::MultiKrum { hostile: 1, selected: 2 }),
            with(&|spec| spec.outer.streaming = Some(StreamingSpec::default())),
            with(&|spec| spec.participation.adaptive_deadline = Some(AdaptiveDeadline::default())),
        ]
    }

    #[test]
    fn the_reference_shows_the_defaults() {
        let least = "name = \"example\"\nrounds = 100\nmodel.architecture = \"llama\"\n";
        assert_eq!(RunSpec::parse(RunSpec::reference()).unwrap(), RunSpec::parse(least).unwrap());
        let spec = RunSpec::parse(least).unwrap();
        assert_eq!((spec.training, spec.outer), (TrainingSpec::default(), OuterSpec::default()));
    }

    #[test]
    fn every_key_is_in_the_reference_and_no_other() {
        let mut known = BTreeSet::new();
        for spec in all_variants() {
            keys(&toml::Value::try_from(spec).unwrap(), "", &mut known);
        }
        let mut listed = BTreeSet::new();
        for section in sections() {
            for (text, _) in &section.settings {
                keys(&toml::Value::Table(text.parse().unwrap()), &section.name, &mut listed);
            }
        }
        assert_eq!(listed, known);
    }

    #[test]
    fn every_setting_that_is_commented_out_can_be_uncommented() {
        let sections = sections();
        let text = |replaced: &Section, uncommented: Option<usize>| -> String {
            let others = sections.iter().filter(|other| other.active && other.name != replaced.name);
            let others: String = others.map(|other| other.toml(None)).collect();
            if replaced.name.is_empty() {
                replaced.toml(uncommented) + &others
            } else {
                others + &replaced.toml(uncommented)
            }
        };
        let mut tried = 0;
        for section in &sections {
            let positions = section.settings.iter().enumerate();
            let commented =
                positions.filter(|(_, (_, active))| section.active && !active).map(|(index, _)| Some(index));
            for uncommented in commented.chain((!section.active).then_some(None)) {
                // Rules for sites that are not trusted ask for some of them.
                let text =
                    text(section, uncommented).replace("minimum_clients = 1\n", "minimum_clients = 5\n");
                RunSpec::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
                tried += 1;
            }
        }
        assert_eq!(tried, 23, "alternatives in the reference");
    }
}
