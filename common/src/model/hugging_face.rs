//! Reading a Hugging Face `config.json`: what this system trains is taken over, what it does not is refused
//! by key and value. An absent key means what `transformers` takes it to mean.

use serde_json::{Map, Value};

use super::Architecture;

/// Why a `config.json` is not one of the architectures.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// The file is JSON but no object.
    #[error("config.json holds no JSON object")]
    NotAnObject,
    /// Another model.
    #[error("model_type is {model_type}; supported: \"llama\", \"gpt2\", \"mpt\"")]
    ModelType {
        /// What is there, as JSON.
        model_type: Value,
    },
    /// A key has a value of the wrong type.
    #[error("{key} is {value}; it must be {expected}")]
    WrongType {
        /// The key.
        key: String,
        /// What is there, as JSON.
        value: Value,
        /// What must be there.
        expected: &'static str,
    },
    /// A feature that is not trained here.
    #[error("{key} is {value}, which is not supported; supported: {supported}")]
    Unsupported {
        /// The key.
        key: String,
        /// What is there, as JSON.
        value: Value,
        /// The values that are.
        supported: String,
    },
    /// Sizes that no model has.
    #[error("{}", list(.0))]
    Sizes(Vec<(&'static str, String)>),
}

impl ConfigError {
    /// The same error about a key inside of the object `outer`.
    pub(super) fn within(mut self, outer: &str) -> Self {
        if let Self::WrongType { key, .. } | Self::Unsupported { key, .. } = &mut self {
            *key = format!("{outer}.{key}");
        }
        self
    }
}

fn list(problems: &[(&'static str, String)]) -> String {
    problems.iter().map(|(key, message)| format!("{key} {message}")).collect::<Vec<_>>().join("; ")
}

impl Architecture {
    /// The architecture that a `config.json` describes.
    ///
    /// # Errors
    /// If it describes another model, or one with features or sizes that are not supported.
    pub fn from_hugging_face_config(config: &Value) -> Result<Self, ConfigError> {
        let reader = ConfigReader(config.as_object().ok_or(ConfigError::NotAnObject)?);
        reader.require("quantization_config", &[])?;
        let architecture = match reader.get("model_type").and_then(Value::as_str) {
            Some("llama") => Self::Llama(super::LlamaConfig::from_hugging_face(&reader)?),
            Some("gpt2") => Self::Gpt2(super::Gpt2Config::from_hugging_face(&reader)?),
            Some("mpt") => Self::Mpt(super::MptConfig::from_hugging_face(&reader)?),
            _ => {
                let model_type = reader.get("model_type").cloned().unwrap_or_default();
                return Err(ConfigError::ModelType { model_type });
            }
        };
        let problems = architecture.problems();
        if problems.is_empty() { Ok(architecture) } else { Err(ConfigError::Sizes(problems)) }
    }
}

/// Typed access to the keys of a `config.json`. Null counts as absent, as it does in `transformers`.
pub(super) struct ConfigReader<'a>(&'a Map<String, Value>);

impl<'a> ConfigReader<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// The object at `key`, nothing when absent.
    pub(super) fn object(&self, key: &str) -> Result<Option<ConfigReader<'a>>, ConfigError> {
        self.typed(key, "an object", Value::as_object).map(|object| object.map(ConfigReader))
    }

    pub(super) fn size(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        let read = |value: &Value| usize::try_from(value.as_u64()?).ok();
        self.typed(key, "a whole number", read).map(|value| value.unwrap_or(default))
    }

    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        self.typed(key, "a number", Value::as_f64).map(|value| value.unwrap_or(default))
    }

    /// A number without a default.
    pub(super) fn needed_number(&self, key: &str) -> Result<f64, ConfigError> {
        let absent =
            || ConfigError::WrongType { key: key.to_owned(), value: Value::Null, expected: "a number" };
        self.typed(key, "a number", Value::as_f64)?.ok_or_else(absent)
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        self.typed(key, "true or false", Value::as_bool).map(|value| value.unwrap_or(default))
    }

    /// Refuses any value of `key` but the `supported`; absent is supported too.
    pub(super) fn require(&self, key: &str, supported: &[Value]) -> Result<(), ConfigError> {
        match self.get(key) {
            Some(value) if !supported.iter().any(|supported| equal(supported, value)) => {
                let mut names: Vec<String> = supported.iter().map(ToString::to_string).collect();
                names.push("absent".to_owned());
                let supported = names.join(", ");
                Err(ConfigError::Unsupported { key: key.to_owned(), value: value.clone(), supported })
            }
            _ => Ok(()),
        }
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || ConfigError::WrongType { key: key.to_owned(), value: value.clone(), expected };
        read(value).map(Some).ok_or_else(wrong)
    }
}

/// Whether two JSON values are the same, 1 and 1.0 included.
fn equal(a: &Value, b: &Value) -> bool {
    a == b || matches!((a.as_f64(), b.as_f64()), (Some(a), Some(b)) if a.total_cmp(&b).is_eq())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::{Gpt2Config, LlamaConfig, MptAttentionConfig, MptConfig, RopeScaling};

    fn rope_scaling() -> RopeScaling {
        RopeScaling { factor: 32.0, ..RopeScaling::default() }
    }

    #[test]
    fn configurations_round_trip() {
        let llama = LlamaConfig::default();
        let full = LlamaConfig {
            tie_word_embeddings: false,
            head_dim: Some(48),
            attention_bias: true,
            mlp_bias: true,
            rope_theta: 5e5,
            rope_scaling: Some(rope_scaling()),
            ..llama
        };
        let gpt2 = Gpt2Config { n_inner: Some(100), tie_word_embeddings: false, ..Gpt2Config::default() };
        let attn_config = MptAttentionConfig { clip_qkv: Some(6.0), softmax_scale: Some(0.1) };
        let mpt = MptConfig { tie_word_embeddings: false, attn_config, ..MptConfig::default() };
        for architecture in [
            Architecture::Llama(llama),
            Architecture::Llama(full),
            Architecture::Gpt2(Gpt2Config::default()),
            Architecture::Gpt2(gpt2),
            Architecture::Mpt(MptConfig::default()),
            Architecture::Mpt(mpt),
        ] {
            let config = architecture.hugging_face_config();
            assert_eq!(Architecture::from_hugging_face_config(&config).unwrap(), architecture);
        }
    }

    #[test]
    fn absent_keys_mean_what_transformers_takes_them_to_mean() {
        let gpt2 = Architecture::from_hugging_face_config(&json!({"model_type": "gpt2"})).unwrap();
        assert_eq!(gpt2.manifest().parameters(), 124_439_808, "the small GPT-2");
        let llama = Architecture::from_hugging_face_config(&json!({"model_type": "llama"})).unwrap();
        assert_eq!(llama.manifest().parameters(), 6_738_415_616, "LLaMA 7B");
        let mpt =
            json!({"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432});
        let mpt = Architecture::from_hugging_face_config(&mpt).unwrap();
        assert_eq!(mpt.manifest().parameters(), 6_649_286_656, "MPT 7B");
    }

    #[test]
    fn version_five_names_the_rotary_base_in_an_object_of_its_own() {
        let config =
            json!({"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}});
        let Architecture::Llama(llama) = Architecture::from_hugging_face_config(&config).unwrap() else {
            panic!("not LLaMA")
        };
        assert!((llama.rope_theta - 5e5).abs() < 1e-9);
    }

    #[test]
    fn scaled_rotary_positions_are_read_from_either_object_and_by_either_name() {
        let scaling = |rope: Value| {
            let mut rope_scaling = rope;
            for (key, value) in [("factor", 32.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0)] {
                rope_scaling[key] = value.into();
            }
            rope_scaling
        };
        let old = json!({
            "model_type": "llama", "rope_theta": 5e5, "max_position_embeddings": 131_072,
            "rope_scaling": scaling(json!({"type": "llama3", "original_max_position_embeddings": 8192})),
        });
        let new = json!({
            "model_type": "llama", "max_position_embeddings": 8192,
            "rope_parameters": scaling(json!({"rope_type": "llama3", "rope_theta": 5e5})),
        });
        for config in [old, new] {
            let Architecture::Llama(llama) = Architecture::from_hugging_face_config(&config).unwrap() else {
                panic!("not LLaMA")
            };
            assert_eq!(llama.rope_scaling, Some(rope_scaling()));
            assert!((llama.rope_theta - 5e5).abs() < 1e-9);
        }
    }

    #[test]
    fn scaling_keeps_fast_rotations_and_divides_slow_ones() {
        let turns = |rotations: f64| std::f64::consts::TAU * rotations / 8192.0;
        for (rotations, factor) in [(4.0, 1.0), (100.0, 1.0), (1.0, 1.0 / 32.0), (0.01, 1.0 / 32.0)] {
            let scaled = rope_scaling().scaled(turns(rotations)) / turns(rotations);
            assert!((scaled / factor - 1.0).abs() < 1e-12, "{rotations}: {scaled}");
        }
        let between = rope_scaling().scaled(turns(2.5)) / turns(2.5);
        assert!((between - (0.5 / 32.0 + 0.5)).abs() < 1e-12, "{between}");
    }

    #[track_caller]
    fn check_refused(config: &Value, expected: &str) {
        assert_eq!(Architecture::from_hugging_face_config(config).unwrap_err().to_string(), expected);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_key_and_value() {
        check_refused(&json!([]), "config.json holds no JSON object");
        check_refused(&json!({}), r#"model_type is null; supported: "llama", "gpt2", "mpt""#);
        check_refused(
            &json!({"model_type": "mistral"}),
            r#"model_type is "mistral"; supported: "llama", "gpt2", "mpt""#,
        );
        check_refused(
            &json!({"model_type": "llama", "attention_bias": 1}),
            "attention_bias is 1; it must be true or false",
        );
        check_refused(
            &json!({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
            "rope_scaling.low_freq_factor is null; it must be a number",
        );
        check_refused(
            &json!({"model_type": "llama", "rope_parameters": {
                "rope_type": "llama3", "factor": 0, "low_freq_factor": 2, "high_freq_factor": 2
            }}),
            "rope_scaling.factor is 0; must be a positive number; \
             rope_scaling.high_freq_factor is 2; must be above rope_scaling.low_freq_factor = 2",
        );
        check_refused(
            &json!({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}),
            r#"rope_scaling.type is "linear", which is not supported; supported: "default", "llama3", absent"#,
        );
        check_refused(
            &json!({"model_type": "llama", "head_dim": 33}),
            "head_dim gives heads of width 33; rotary positions need an even width",
        );
        check_refused(
            &json!({"model_type": "mpt", "attn_config": {"qk_ln": true}}),
            "attn_config.qk_ln is true, which is not supported; supported: false, absent",
        );
        check_refused(
            &json!({"model_type": "mpt", "no_bias": false}),
            "no_bias is false, which is not supported; supported: true, absent",
        );
        check_refused(
            &json!({"model_type": "mpt", "attn_config": {"clip_qkv": -1}}),
            "attn_config.clip_qkv is -1; must be a positive number",
        );
        check_refused(
            &json!({"model_type": "llama", "hidden_act": "gelu"}),
            r#"hidden_act is "gelu", which is not supported; supported: "silu", absent"#,
        );
        check_refused(
            &json!({"model_type": "gpt2", "activation_function": "relu"}),
            r#"activation_function is "relu", which is not supported; supported: "gelu_new", "gelu_pytorch_tanh", absent"#,
        );
        check_refused(
            &json!({"model_type": "gpt2", "n_embd": "768"}),
            r#"n_embd is "768"; it must be a whole number"#,
        );
        check_refused(&json!({"model_type": "gpt2", "n_head": 0}), "n_head is 0; allowed: 1 to 65536");
    }
}
