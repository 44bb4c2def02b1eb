//! Reads a TOML table as a specification and lists everything that does not fit its types.
//!
//! serde stops at the first error. So each error is located, written down and repaired in the table (the
//! key removed, so that its default stands in, or given a placeholder where there is no default), and
//! the table is read again. What comes out is the specification with the faulty keys neutralised.

use serde::Deserialize;
use toml::{Table, Value};

use super::{RunSpec, validate::Problem};

/// Problems listed at most; each costs another reading of the table.
const PROBLEMS_MAX: usize = 100;
/// A found value is shown up to this many characters.
const SHOWN_CHARACTERS_MAX: usize = 60;
/// Similarity (Jaro-Winkler, 0 to 1) from which a known name is suggested for an unknown one.
const SUGGESTION_SIMILARITY_MIN: f64 = 0.85;
/// Keys that choose the variant of their table. When one is wrong nothing else in the table can be
/// judged.
const TAGS: [&str; 2] = ["architecture", "kind"];

/// What reading gave.
pub(super) struct Reading {
    /// The repaired specification; nothing when it could not be repaired.
    pub spec: Option<RunSpec>,
    pub problems: Vec<Problem>,
}

pub(super) fn read(mut root: Table) -> Reading {
    let mut problems: Vec<Problem> = Vec::new();
    for _ in 0..PROBLEMS_MAX {
        let failure = match attempt(&root) {
            Ok(spec) => return Reading { spec: Some(spec), problems },
            Err(failure) => failure,
        };
        let Fault { path, message, unknown } = explain(&root, &failure);
        let problem = Problem { path: path.join("."), message };
        let stuck = problems.last() == Some(&problem);
        if !stuck {
            problems.push(problem);
        }
        let repaired = if unknown { remove(&mut root, &path) } else { repair(&mut root, &path) };
        if stuck || !repaired {
            return Reading { spec: None, problems };
        }
    }
    let message = format!("more than {PROBLEMS_MAX} problems: the others are not listed");
    problems.push(Problem { path: String::new(), message });
    Reading { spec: None, problems }
}

/// serde's complaint and the path of the table or value that it was looking at.
#[derive(PartialEq)]
struct Failure {
    path: Vec<String>,
    message: String,
}

fn attempt(root: &Table) -> Result<RunSpec, Failure> {
    let mut track = serde_path_to_error::Track::new();
    let deserializer = serde_path_to_error::Deserializer::new(Value::Table(root.clone()), &mut track);
    RunSpec::deserialize(deserializer).map_err(|error| {
        let path = track.path();
        let keys = path.iter().filter_map(|segment| match segment {
            serde_path_to_error::Segment::Map { key } => Some(key.clone()),
            _ => None,
        });
        Failure { path: keys.collect(), message: error.message().trim().to_owned() }
    })
}

/// The kinds of serde's messages that matter here.
enum Complaint<'a> {
    UnknownKey {
        key: &'a str,
        known: Vec<&'a str>,
    },
    MissingKey {
        key: &'a str,
    },
    UnknownVariant {
        known: Vec<&'a str>,
    },
    InvalidValue {
        expected: &'a str,
    },
    /// A message of our own types.
    Other,
}

impl<'a> Complaint<'a> {
    fn of(message: &'a str) -> Self {
        if let Some(rest) = message.strip_prefix("unknown field `") {
            let (key, known) = rest
                .rsplit_once("`, expected ")
                .or_else(|| rest.rsplit_once("`, there are no"))
                .unwrap_or((rest, ""));
            Self::UnknownKey { key, known: backticked(known) }
        } else if let Some(rest) = message.strip_prefix("missing field `") {
            Self::MissingKey { key: rest.trim_end_matches('`') }
        } else if let Some(rest) = message.strip_prefix("unknown variant `") {
            Self::UnknownVariant { known: backticked(rest.rsplit_once("`, expected ").unwrap_or_default().1) }
        } else if message.starts_with("invalid type: ") || message.starts_with("invalid value: ") {
            Self::InvalidValue { expected: message.rsplit_once(", expected ").unwrap_or_default().1 }
        } else {
            Self::Other
        }
    }
}

/// The names in "one of `a`, `b`, `c`" or "`a` or `b`".
fn backticked(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// One thing to correct.
struct Fault {
    path: Vec<String>,
    message: String,
    /// Whether the key itself is what is wrong.
    unknown: bool,
}

/// Where the fault is and what to say about it.
fn explain(root: &Table, failure: &Failure) -> Fault {
    let mut path = failure.path.clone();
    match Complaint::of(&failure.message) {
        Complaint::UnknownKey { key, known } => {
            // The path ends with the key itself or with its table, depending on where serde was.
            if path.last().is_none_or(|last| last != key) || value_at(root, &path).is_none() {
                path.extend(table_with(root, &path, key));
                path.push(key.to_owned());
            }
            let known: Vec<&str> = known.into_iter().filter(|name| !TAGS.contains(name)).collect();
            let message = match (suggestion(key, &known), known.is_empty()) {
                (Some(name), _) => format!("is not a known key; did you mean `{name}`?"),
                (None, true) => "is not a known key; none is allowed here".to_owned(),
                (None, false) => format!("is not a known key; known here: {}", known.join(", ")),
            };
            Fault { path, message, unknown: true }
        }
        Complaint::MissingKey { key } => {
            path.push(key.to_owned());
            let message = format!("is missing; allowed: {}", allowed_at(root, &path));
            Fault { path, message, unknown: false }
        }
        complaint => {
            // Inside a table whose variant a key chooses, serde knows the table only.
            while let Some(Value::Table(table)) = value_at(root, &path)
                && let Some(key) = guilty_key(root, &path, table, failure)
            {
                path.push(key);
            }
            let found = value_at(root, &path).map_or_else(|| "absent".to_owned(), show);
            let message = match complaint {
                Complaint::Other => failure.message.replace('\n', " "),
                _ => format!("is {found}; allowed: {}", allowed_at(root, &path)),
            };
            Fault { path, message, unknown: false }
        }
    }
}

/// The name of the table inside the one at `path` that has `key`, if that one has it not: inside a table
/// whose variant a key chooses, serde knows the table only.
fn table_with(root: &Table, path: &[String], key: &str) -> Option<String> {
    let Some(Value::Table(table)) = value_at(root, path) else { return None };
    if table.contains_key(key) {
        return None;
    }
    table.iter().find(|(_, inner)| inner.get(key).is_some()).map(|(name, _)| name.clone())
}

/// The key of `table` without which serde says something else; the one that chooses the variant, without
/// which it always does, comes last.
fn guilty_key(root: &Table, path: &[String], table: &Table, failure: &Failure) -> Option<String> {
    let differs = |key: &&String| {
        let mut without = root.clone();
        if let Some(table) = table_at(&mut without, path) {
            table.remove(*key);
        }
        attempt(&without).err().as_ref() != Some(failure)
    };
    let (tags, others): (Vec<&String>, Vec<&String>) =
        table.keys().partition(|key| TAGS.contains(&key.as_str()));
    others.into_iter().chain(tags).find(differs).cloned()
}

/// What may stand at `path`, in words: found out by putting an empty string there.
fn allowed_at(root: &Table, path: &[String]) -> String {
    let Some((key, parents)) = path.split_last() else { return "a table".to_owned() };
    let mut probed = root.clone();
    let Some(table) = table_at(&mut probed, parents) else { return "a table".to_owned() };
    table.insert(key.clone(), Value::String(String::new()));
    let Err(failure) = attempt(&probed) else { return "a string".to_owned() };
    match Complaint::of(&failure.message) {
        Complaint::UnknownVariant { known } => {
            known.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ")
        }
        Complaint::InvalidValue { expected } => in_words(expected).to_owned(),
        Complaint::Other if failure.path == path => {
            failure.message.rsplit("; allowed: ").next().unwrap_or_default().to_owned()
        }
        _ => "a string".to_owned(),
    }
}

/// serde's name of a type as people say it.
fn in_words(expected: &str) -> &str {
    match expected {
        "u32" => "a whole number from 0 to 4294967295",
        "u64" | "usize" => "a whole number, 0 or more",
        "f64" => "a number",
        _ if expected.starts_with("struct ") || expected.contains("tagged enum") => "a table",
        _ => expected,
    }
}

/// A value as the specification would write it, cut to what can be shown.
fn show(value: &Value) -> String {
    match value {
        Value::Table(_) => "a table".to_owned(),
        Value::Array(_) => "an array".to_owned(),
        value => {
            let text = value.to_string();
            if text.chars().count() <= SHOWN_CHARACTERS_MAX {
                return text;
            }
            text.chars().take(SHOWN_CHARACTERS_MAX).chain("...".chars()).collect()
        }
    }
}

fn suggestion<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let similarity = |name: &str| strsim::jaro_winkler(&key.to_lowercase(), name);
    let best = known.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)))?;
    (similarity(best) >= SUGGESTION_SIMILARITY_MIN).then_some(*best)
}

/// Makes the key at `path` harmless: its default, or a placeholder where there is none. Where the key
/// chooses a variant, the whole table is replaced. Whether anything could be done.
fn repair(root: &mut Table, path: &[String]) -> bool {
    let path = match path.split_last() {
        Some((tag, parents)) if TAGS.contains(&tag.as_str()) && !parents.is_empty() => parents,
        _ => path,
    };
    let Some((key, parents)) = path.split_last() else { return false };
    let Some(table) = table_at(root, parents) else { return false };
    match placeholder(key, parents) {
        Some(value) => {
            table.insert(key.clone(), value);
            true
        }
        None => table.remove(key).is_some(),
    }
}

/// Removes the key at `path`; whether it was there.
fn remove(root: &mut Table, path: &[String]) -> bool {
    path.split_last().and_then(|(key, parents)| table_at(root, parents)?.remove(key)).is_some()
}

/// A valid value for each key that has no default.
fn placeholder(key: &str, parents: &[String]) -> Option<Value> {
    match (parents.first().map(String::as_str), key) {
        (None, "name") => Some("unnamed".into()),
        (None, "rounds") => Some(1.into()),
        (None, "model") => {
            Some(Value::Table(Table::from_iter([("architecture".to_owned(), "llama".into())])))
        }
        (Some("tokenizer"), "path" | "end_of_text") | (Some("start"), "checkpoint") => {
            Some("placeholder".into())
        }
        (Some("training"), "decay_steps") => Some(1.into()),
        _ => None,
    }
}

fn value_at<'a>(root: &'a Table, path: &[String]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(root.get(first)?, |value, key| value.get(key))
}

fn table_at<'a>(root: &'a mut Table, path: &[String]) -> Option<&'a mut Table> {
    path.iter().try_fold(root, |table, key| table.get_mut(key)?.as_table_mut())
}
