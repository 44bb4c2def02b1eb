//! Specifications of runs that start from a checkpoint: what the checkpoint says, it need not say again.

use std::collections::BTreeMap;

use serde_json::Value;
use toml::Table;

use super::{RunSpec, TokenizerSpec, validate::Problem};
use crate::{
    model::Architecture,
    tokenizer::{BYTE_END_OF_TEXT, byte_tokenizer_json, vocabulary},
};

/// What a specification must fit that names a checkpoint to start from.
#[derive(Debug, Clone, PartialEq)]
pub struct StartingPoint {
    /// The checkpoint's model.
    pub architecture: Architecture,
    /// Its `tokenizer.json`.
    pub tokenizer: Value,
    /// The token that ends a document, as text.
    pub end_of_text: String,
}

impl RunSpec {
    /// The checkpoint that a specification's text names, be the rest of it right or wrong.
    pub fn start_checkpoint(toml: &str) -> Option<String> {
        let specification: Table = toml.parse().ok()?;
        specification.get("start")?.get("checkpoint")?.as_str().map(str::to_owned)
    }
}

impl StartingPoint {
    /// The specification with the sections `[model]` and `[tokenizer]` that it leaves to the checkpoint added at
    /// its end. `tokenizer_path` is the checkpoint's `tokenizer.json`, relative to the specification; the byte
    /// tokenizer, which is the default, is not written down. A text that is not TOML comes back as it is.
    pub fn complete(&self, toml: &str, tokenizer_path: &str) -> String {
        let Ok(specification) = toml.parse::<Table>() else { return toml.to_owned() };
        let mut added = Table::new();
        if !specification.contains_key("model") {
            added.extend(Table::try_from(&self.architecture).map(|model| ("model".to_owned(), model.into())));
        }
        if !specification.contains_key("tokenizer") && !self.has_byte_tokenizer() {
            let keys = [("kind", "file"), ("path", tokenizer_path), ("end_of_text", &self.end_of_text)];
            let tokenizer: Table =
                keys.into_iter().map(|(key, value)| (key.to_owned(), value.into())).collect();
            added.insert("tokenizer".to_owned(), tokenizer.into());
        }
        if added.is_empty() {
            return toml.to_owned();
        }
        format!("{}\n\n# Of the checkpoint that the run starts from.\n{added}", toml.trim_end())
    }

    /// Whether text becomes tokens as with the built-in tokenizer.
    fn has_byte_tokenizer(&self) -> bool {
        let byte: Value = serde_json::from_str(&byte_tokenizer_json()).unwrap_or_default();
        self.tokenizer == byte
    }

    /// What in a specification is not the checkpoint's; `tokenizer` is the run's `tokenizer.json`, absent where
    /// it is the byte tokenizer.
    pub fn problems(&self, spec: &RunSpec, tokenizer: Option<&Value>) -> Vec<Problem> {
        let byte;
        let tokenizer = match tokenizer {
            Some(tokenizer) => tokenizer,
            None => {
                byte = serde_json::from_str(&byte_tokenizer_json()).unwrap_or_default();
                &byte
            }
        };
        let mut problems = self.model_problems(&spec.model);
        problems.extend(self.tokenizer_problem(tokenizer).or_else(|| self.rules_problem(tokenizer)));
        problems.extend(self.end_of_text_problem(&spec.tokenizer));
        problems
    }

    fn model_problems(&self, model: &Architecture) -> Vec<Problem> {
        let table =
            |model: &Architecture| Table::try_from(model.clone().without_usual_sizes()).unwrap_or_default();
        let (ours, theirs) = (table(model), table(&self.architecture));
        let differs = |key: &&String| ours.get(*key) != theirs.get(*key) && *key != "initializer_range";
        let keys: Vec<&String> = match model.name() == self.architecture.name() {
            true => ours.keys().chain(theirs.keys().filter(|key| !ours.contains_key(*key))).collect(),
            // All others differ then, and say nothing more.
            false => ours.keys().filter(|key| *key == "architecture").collect(),
        };
        let shown =
            |table: &Table, key: &String| table.get(key).map_or("absent".to_owned(), ToString::to_string);
        let problem = |key: &String| Problem {
            path: format!("model.{key}"),
            message: format!(
                "is {}; the checkpoint's is {}: leave [model] out to take the checkpoint's",
                shown(&ours, key),
                shown(&theirs, key)
            ),
        };
        keys.into_iter().filter(differs).map(problem).collect()
    }

    /// The rows of the embedding mean the checkpoint's tokens: where both tokenizers know a text or an id, they
    /// must agree. One of them may know more.
    fn tokenizer_problem(&self, tokenizer: &Value) -> Option<Problem> {
        let (ours, theirs) = (vocabulary(tokenizer), vocabulary(&self.tokenizer));
        let message = |message: String| Problem {
            path: "tokenizer".to_owned(),
            message: format!("{message}: leave [tokenizer] out to take the checkpoint's"),
        };
        let texts: BTreeMap<u64, &str> = theirs.iter().map(|(text, id)| (*id, text.as_str())).collect();
        for (text, id) in &ours {
            if let Some(other) = theirs.get(text).filter(|other| *other != id) {
                return Some(message(format!(
                    "gives {text:?} the id {id}; the checkpoint's gives it {other}"
                )));
            }
            if let Some(other) = texts.get(id).filter(|other| **other != text.as_str()) {
                return Some(message(format!(
                    "gives the id {id} to {text:?}; the checkpoint's gives it to {other:?}"
                )));
            }
        }
        None
    }

    /// Documents must end as those did that the checkpoint was trained on.
    fn end_of_text_problem(&self, tokenizer: &TokenizerSpec) -> Option<Problem> {
        let ours = match tokenizer {
            TokenizerSpec::Byte {} => BYTE_END_OF_TEXT,
            TokenizerSpec::File { end_of_text, .. } => end_of_text,
        };
        let theirs = &self.end_of_text;
        (ours != theirs).then(|| Problem {
            path: "tokenizer.end_of_text".to_owned(),
            message: format!(
                "is {ours:?}; the checkpoint's is {theirs:?}: leave [tokenizer] out to take the checkpoint's"
            ),
        })
    }

    /// The same ids are of no use where the same text is cut into other tokens.
    fn rules_problem(&self, tokenizer: &Value) -> Option<Problem> {
        let theirs = &self.tokenizer;
        let differs = |section: &&str| rules(&tokenizer[section]) != rules(&theirs[section]);
        let merges = |tokenizer: &Value| -> Vec<String> {
            tokenizer["model"]["merges"].as_array().into_iter().flatten().map(merge).collect()
        };
        let (ours, of_checkpoint) = (merges(tokenizer), merges(theirs));
        // A tokenizer that knows more tokens has more merges, after the same ones.
        let same_merges = ours.iter().zip(&of_checkpoint).all(|(ours, theirs)| ours == theirs);
        let section = ["normalizer", "pre_tokenizer", "model"].into_iter().find(differs);
        let section = section.or((!same_merges).then_some("model.merges"))?;
        Some(Problem {
            path: "tokenizer".to_owned(),
            message: format!(
                "has another {section} in its tokenizer.json than the checkpoint's: leave [tokenizer] out to take \
                 the checkpoint's"
            ),
        })
    }
}

/// A section of a `tokenizer.json` by which text is cut, less what says nothing: keys with their default value,
/// those that matter to offsets only, and the tokens themselves.
fn rules(section: &Value) -> Value {
    match section {
        Value::Object(keys) => {
            let is_model = keys.contains_key("vocab");
            let says_something = |key: &str, value: &Value| match key {
                "vocab" | "merges" | "trim_offsets" => false,
                "use_regex" => value != &Value::Bool(true),
                _ if is_model => !(value.is_null() || value == false || value == ""),
                _ => !value.is_null(),
            };
            let kept = keys.iter().filter(|(key, value)| says_something(key, value));
            kept.map(|(key, value)| (key.clone(), rules(value))).collect()
        }
        Value::Array(parts) => parts.iter().map(rules).collect(),
        value => value.clone(),
    }
}

/// A merge of two tokens in either way of writing it: "a b" or ["a", "b"].
fn merge(merge: &Value) -> String {
    match merge {
        Value::Array(pair) => pair.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
        merge => merge.as_str().unwrap_or_default().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        model::{Gpt2Config, LlamaConfig},
        spec::TokenizerSpec,
    };

    fn starting_point(tokenizer: Value) -> StartingPoint {
        let config = LlamaConfig { hidden_size: 64, vocab_size: 300, ..LlamaConfig::default() };
        let end_of_text = if tokenizer == byte() { BYTE_END_OF_TEXT } else { "</s>" }.to_owned();
        StartingPoint { architecture: Architecture::Llama(config), tokenizer, end_of_text }
    }

    fn byte() -> Value {
        serde_json::from_str(&byte_tokenizer_json()).unwrap()
    }

    fn words(vocabulary: &[(&str, u64)]) -> Value {
        json!({"model": {"vocab": vocabulary.iter().copied().collect::<BTreeMap<_, _>>()}})
    }

    const TEXT: &str =
        "name = \"a\"\nrounds = 1\nstart.checkpoint = \"../model\"\n[wire]\nchunk_parameters = 2048";

    #[test]
    fn what_the_specification_leaves_out_is_the_checkpoints() {
        let start = starting_point(byte());
        let completed = start.complete(TEXT, "../model/tokenizer.json");
        let spec = RunSpec::parse(&completed).unwrap();
        assert!(completed.starts_with(TEXT));
        assert_eq!(spec.model, start.architecture);
        assert_eq!(spec.tokenizer, TokenizerSpec::Byte {});
        assert_eq!(start.problems(&spec, None), []);
        assert_eq!(start.complete(&completed, ""), completed, "nothing is added twice");

        let start = starting_point(words(&[("a", 0), ("</s>", 1)]));
        let spec = RunSpec::parse(&start.complete(TEXT, "../model/tokenizer.json")).unwrap();
        let path = "../model/tokenizer.json".to_owned();
        let expected = TokenizerSpec::File { path, end_of_text: "</s>".to_owned() };
        assert_eq!(spec.tokenizer, expected);
    }

    #[test]
    fn the_checkpoint_is_found_in_a_specification_that_is_otherwise_wrong() {
        assert_eq!(RunSpec::start_checkpoint(TEXT).as_deref(), Some("../model"));
        assert_eq!(
            RunSpec::start_checkpoint("rounds = \"x\"\n[start]\ncheckpoint = \"c\"").as_deref(),
            Some("c")
        );
        for none in ["", "name = 3", "start = 3", "[start]\ncheckpoint = 3", "no = [TOML"] {
            assert_eq!(RunSpec::start_checkpoint(none), None, "{none}");
        }
    }

    /// The problems of a specification with `model`, one line each.
    #[track_caller]
    fn check(start: &StartingPoint, model: Architecture, tokenizer: &Value, expected: &[&str]) {
        let spec = RunSpec { model, ..RunSpec::parse(&start.complete(TEXT, "t")).unwrap() };
        let problems = start.problems(&spec, Some(tokenizer));
        assert_eq!(problems.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_model_that_is_not_the_checkpoints_is_a_problem_key_by_key() {
        let start = starting_point(byte());
        let Architecture::Llama(config) = &start.architecture else { panic!("is LLaMA") };
        let other = LlamaConfig { hidden_size: 128, rope_theta: 5e5, ..config.clone() };
        check(
            &start,
            Architecture::Llama(other),
            &byte(),
            &[
                "model.hidden_size is 128; the checkpoint's is 64: leave [model] out to take the checkpoint's",
                "model.rope_theta is 500000.0; the checkpoint's is 10000.0: leave [model] out to take the checkpoint's",
            ],
        );
        check(
            &start,
            Architecture::Gpt2(Gpt2Config::default()),
            &byte(),
            &[
                "model.architecture is \"gpt2\"; the checkpoint's is \"llama\": leave [model] out to take the checkpoint's",
            ],
        );
        // Written down or left out, a size is the same.
        let usual = LlamaConfig { head_dim: Some(16), ..config.clone() };
        check(&start, Architecture::Llama(usual.clone()), &byte(), &[]);
        let written = StartingPoint { architecture: Architecture::Llama(usual), ..start.clone() };
        check(&written, start.architecture.clone(), &byte(), &[]);
        let other = LlamaConfig { head_dim: Some(32), ..config.clone() };
        check(
            &start,
            Architecture::Llama(other),
            &byte(),
            &["model.head_dim is 32; the checkpoint's is absent: leave [model] out to take the checkpoint's"],
        );
        let inner = |n_inner| Architecture::Gpt2(Gpt2Config { n_inner, ..Gpt2Config::default() });
        let gpt2 = StartingPoint { architecture: inner(None), ..start.clone() };
        check(&gpt2, inner(Some(512)), &byte(), &[]);
        // It says how weights begin, and they do not begin here.
        let other = LlamaConfig { initializer_range: 0.5, ..config.clone() };
        check(&start, Architecture::Llama(other), &byte(), &[]);
    }

    #[test]
    fn a_tokenizer_with_other_ids_is_a_problem_and_one_with_more_tokens_is_not() {
        let start = starting_point(words(&[("a", 0), ("b", 1), ("</s>", 2)]));
        let model = || start.architecture.clone();
        check(&start, model(), &words(&[("a", 0), ("b", 1), ("</s>", 2), ("c", 3)]), &[]);
        check(&start, model(), &words(&[("a", 0), ("</s>", 2)]), &[]);
        check(
            &start,
            model(),
            &words(&[("a", 0), ("b", 2), ("</s>", 1)]),
            &[
                "tokenizer gives \"</s>\" the id 1; the checkpoint's gives it 2: leave [tokenizer] out to take the checkpoint's",
            ],
        );
        check(
            &start,
            model(),
            &words(&[("x", 1)]),
            &[
                "tokenizer gives the id 1 to \"x\"; the checkpoint's gives it to \"b\": leave [tokenizer] out to take the checkpoint's",
            ],
        );
    }

    #[test]
    fn an_end_of_text_that_is_not_the_checkpoints_is_a_problem() {
        let start = starting_point(words(&[("a", 0), ("</s>", 1)]));
        let spec = RunSpec::parse(&start.complete(TEXT, "t")).unwrap();
        let other = StartingPoint { end_of_text: "a".to_owned(), ..start.clone() };
        let problems: Vec<String> =
            other.problems(&spec, Some(&start.tokenizer)).iter().map(ToString::to_string).collect();
        assert_eq!(
            problems,
            [
                "tokenizer.end_of_text is \"</s>\"; the checkpoint's is \"a\": leave [tokenizer] out to take the checkpoint's"
            ]
        );
    }

    #[test]
    fn a_tokenizer_that_cuts_text_otherwise_is_a_problem_whatever_its_ids() {
        let tokenizer = |merges: Value| {
            let vocabulary = json!({"a": 0, "b": 1, "ab": 2, "</s>": 3});
            json!({
                "normalizer": null,
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true},
                "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
            })
        };
        let start = starting_point(tokenizer(json!(["a b"])));
        let model = || start.architecture.clone();
        let mut same = tokenizer(json!([["a", "b"], ["ab", "a"]]));
        same["model"]["dropout"] = json!(null);
        same["model"]["byte_fallback"] = json!(false);
        same["pre_tokenizer"]["use_regex"] = json!(true);
        same["pre_tokenizer"]["trim_offsets"] = json!(false);
        check(&start, model(), &same, &[]);
        let mut others = Vec::new();
        for (section, other) in [
            ("normalizer", json!({"type": "NFC"})),
            ("pre_tokenizer", json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false})),
            ("pre_tokenizer", json!({"type": "ByteLevel", "add_prefix_space": true})),
        ] {
            let mut tokenizer = tokenizer(json!(["a b"]));
            tokenizer[section] = other;
            others.push((section, tokenizer));
        }
        let mut ignoring = tokenizer(json!(["a b"]));
        ignoring["model"]["ignore_merges"] = json!(true);
        others.push(("model", ignoring));
        others.push(("model.merges", tokenizer(json!(["b a"]))));
        for (section, other) in others {
            let expected = format!(
                "tokenizer has another {section} in its tokenizer.json than the checkpoint's: leave [tokenizer] out to \
                 take the checkpoint's"
            );
            check(&start, model(), &other, &[&expected]);
        }
    }
}
