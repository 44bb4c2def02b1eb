//! Run specifications on this machine: reading one with its tokenizer, checking it, the commented
//! reference. Needs no aggregator.

use std::{
    io::{self, Read},
    path::Path,
};

use bytes::Bytes;
use consort_common::{
    spec::{Problem, RunSpec, SPEC_BYTES_MAX},
    units,
};
use consort_proto::v1::{CreateRunRequest, FilePart, StartModel, create_run_request::Part};
use serde_json::{Value, json};

use crate::{
    failure::Failure,
    output::{self, Output},
    start::StartCheckpoint,
    text::wrap,
};

/// Largest `tokenizer.json` that is read, in bytes; those of the largest vocabularies have about 20 MB.
const TOKENIZER_BYTES_MAX: usize = 64 << 20;
/// Bytes of the tokenizer in one message.
const PART_BYTES: usize = 1 << 20;

/// A valid specification with all that creating its run takes.
#[derive(Debug)]
pub struct Specification {
    text: String,
    /// The specification.
    pub spec: RunSpec,
    /// `tokenizer.json`; empty where the built-in tokenizer is used.
    tokenizer: Bytes,
    /// What the run starts from, where it is not the seed's.
    pub start: Option<StartCheckpoint>,
}

impl Specification {
    /// Reads and validates the specification at `path` and the tokenizer that it names.
    pub fn load(path: &Path) -> Result<Self, Failure> {
        Self::read(path)?.map_err(|problems| Failure::Usage(problem_text(path, &problems)))
    }

    /// All problems of what is in the file; the outer error is that there is no such file.
    fn read(path: &Path) -> Result<Result<Self, Vec<Problem>>, Failure> {
        let bytes = read_at_most(path, SPEC_BYTES_MAX).map_err(|error| {
            Failure::Usage(format!("cannot read the specification {}: {error}", path.display()))
        })?;
        let problem = |path: &str, message: String| vec![Problem { path: path.to_owned(), message }];
        let Ok(text) = String::from_utf8(bytes) else {
            return Ok(Err(problem("", "is not UTF-8 text".to_owned())));
        };
        let folder = path.parent().unwrap_or(Path::new(""));
        let named = RunSpec::start_checkpoint(&text);
        let start = named.as_ref().map(|named| StartCheckpoint::open(&folder.join(named))).transpose();
        let start = start.map_err(|message| problem("start.checkpoint", message));
        let text = match (&start, named) {
            (Ok(Some(start)), Some(named)) => {
                start.point().complete(&text, &format!("{}/tokenizer.json", named.trim_end_matches('/')))
            }
            _ => text,
        };
        let tokenizer = match tokenizer_path(&text) {
            Some(tokenizer) => read_tokenizer(&folder.join(tokenizer)),
            None => Ok(Bytes::new()),
        };
        let tokenizer = tokenizer.map_err(|message| problem("tokenizer.path", message));
        match (RunSpec::parse(&text), tokenizer, start) {
            (Ok(spec), Ok(tokenizer), Ok(start)) => {
                let problems = start.as_ref().map(|start| start.problems(&spec, &tokenizer));
                match problems.filter(|problems| !problems.is_empty()) {
                    None => Ok(Ok(Self { text, spec, tokenizer, start })),
                    Some(problems) => Ok(Err(problems)),
                }
            }
            (spec, tokenizer, start) => {
                let mut problems = spec.err().map_or_else(Vec::new, |error| error.problems);
                if start.is_err() {
                    // The checkpoint would have said what it is.
                    problems.retain(|problem| problem.path != "model");
                }
                problems.extend([tokenizer.err(), start.err()].into_iter().flatten().flatten());
                Ok(Err(problems))
            }
        }
    }

    /// The specification's text, with what it leaves to the checkpoint that it names.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The messages that create the run: the specification, then the tokenizer in parts, then the model that it
    /// starts from, which the aggregator has.
    pub fn into_messages(
        self,
        start: Option<StartModel>,
    ) -> impl Iterator<Item = CreateRunRequest> + Send + 'static {
        let Self { text, tokenizer, .. } = self;
        let message = |part| CreateRunRequest { part: Some(part) };
        let parts = (0..tokenizer.len()).step_by(PART_BYTES).map(move |offset| {
            Part::Tokenizer(FilePart {
                name: "tokenizer.json".to_owned(),
                file_bytes: tokenizer.len() as u64,
                offset: offset as u64,
                data: tokenizer.slice(offset..tokenizer.len().min(offset + PART_BYTES)),
            })
        });
        std::iter::once(Part::Specification(text)).chain(parts).chain(start.map(Part::Start)).map(message)
    }
}

/// `consort runs check`: everything that is wrong with a specification, or what it asks for.
pub fn check(path: &Path, output: &Output) -> Result<(), Failure> {
    match Specification::read(path)? {
        Ok(specification) => {
            let words = format!("{} is valid: {}.", path.display(), in_words(&specification));
            output.show(&valid_document(&specification), &wrap(&words, output.columns))
        }
        Err(problems) => {
            if output.json {
                output::print_document(&invalid_document(&problems))?;
            }
            Err(Failure::Usage(problem_text(path, &problems)))
        }
    }
}

/// `consort runs reference`: a specification with every key, its default and its meaning.
pub fn reference(output: &Output) -> Result<(), Failure> {
    if output.json {
        return output::print_document(&json!({ "reference_toml": RunSpec::reference() }));
    }
    output::print(RunSpec::reference())
}

/// What a specification asks for.
pub fn in_words(specification: &Specification) -> String {
    let spec = &specification.spec;
    let start = specification.start.as_ref();
    format!(
        "the run {} trains a model of {} parameters{} in {} rounds of {} local steps, {} tokens per site and round",
        spec.name,
        units::count(spec.model.manifest().parameters()),
        start.map_or_else(String::new, |start| format!(", starting from {},", start.origin())),
        spec.rounds,
        spec.training.local_steps,
        units::count(spec.tokens(spec.training.local_steps)),
    )
}

fn valid_document(specification: &Specification) -> Value {
    let spec = &specification.spec;
    json!({
        "valid": true,
        "problems": [],
        "name": spec.name,
        "spec_digest": RunSpec::digest(&specification.text),
        "start": specification.start.as_ref().map(StartCheckpoint::origin),
        "parameters": spec.model.manifest().parameters(),
        "rounds": spec.rounds,
        "tokens_per_site_and_round": spec.tokens(spec.training.local_steps),
    })
}

fn invalid_document(problems: &[Problem]) -> Value {
    let problems = problems.iter().map(|problem| json!({ "path": problem.path, "message": problem.message }));
    json!({ "valid": false, "problems": problems.collect::<Vec<_>>() })
}

fn problem_text(path: &Path, problems: &[Problem]) -> String {
    let count = crate::words::plural(problems.len(), "problem");
    let mut text = format!("the specification {} has {count}:", path.display());
    for problem in problems {
        text += &format!("\n  {}", problem.to_string().trim_end().replace('\n', "\n    "));
    }
    text
}

/// The tokenizer that a specification names, be the rest of it right or wrong: its file's problem is to be
/// listed with all others.
fn tokenizer_path(text: &str) -> Option<String> {
    let specification: toml::Table = text.parse().ok()?;
    let tokenizer = specification.get("tokenizer")?;
    let is_file = tokenizer.get("kind")?.as_str()? == "file";
    tokenizer.get("path")?.as_str().filter(|_| is_file).map(str::to_owned)
}

fn read_tokenizer(path: &Path) -> Result<Bytes, String> {
    let bytes = read_at_most(path, TOKENIZER_BYTES_MAX)
        .map_err(|error| format!("names {}, which cannot be read: {error}", path.display()))?;
    let parsed: Result<serde::de::IgnoredAny, _> = serde_json::from_slice(&bytes);
    match parsed {
        Ok(_) => Ok(bytes.into()),
        Err(error) => Err(format!("names {}, which is not a tokenizer.json: {error}", path.display())),
    }
}

fn read_at_most(path: &Path, bytes_max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(bytes_max as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > bytes_max {
        return Err(io::Error::other(format!("it is larger than {}", units::bytes(bytes_max as u64))));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_operator::{FakeOperator, Script};

    const SPEC: &str = r#"
        name = "demo"
        rounds = 2
        [model]
        architecture = "gpt2"
        [tokenizer]
        kind = "file"
        path = "words/tokenizer.json"
        end_of_text = "<eos>"
    "#;

    fn folder(tokenizer: Option<&[u8]>) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("run.toml"), SPEC).unwrap();
        std::fs::create_dir(folder.path().join("words")).unwrap();
        if let Some(tokenizer) = tokenizer {
            std::fs::write(folder.path().join("words/tokenizer.json"), tokenizer).unwrap();
        }
        folder
    }

    #[tokio::test]
    async fn the_tokenizer_beside_the_specification_is_sent_in_parts() {
        let tokenizer = serde_json::to_vec(&"x".repeat(2 * PART_BYTES)).unwrap();
        let folder = folder(Some(&tokenizer));
        let specification = Specification::load(&folder.path().join("run.toml")).unwrap();
        let (fake, mut operator, _server) = FakeOperator::serve(Script::default()).await;
        operator.create_run(tokio_stream::iter(specification.into_messages(None))).await.unwrap();

        let messages = std::mem::take(&mut fake.0.lock().unwrap().created);
        assert_eq!(messages[0].part, Some(Part::Specification(SPEC.to_owned())));
        let mut received = Vec::new();
        for message in &messages[1..] {
            let Some(Part::Tokenizer(part)) = &message.part else { panic!("{message:?}") };
            assert_eq!((part.offset, part.file_bytes), (received.len() as u64, tokenizer.len() as u64));
            assert!(part.data.len() <= PART_BYTES);
            received.extend_from_slice(&part.data);
        }
        assert_eq!(messages.len(), 4);
        assert!(received == tokenizer);
    }

    #[test]
    fn a_missing_or_wrong_tokenizer_is_a_problem_of_the_specification() {
        for (tokenizer, expected) in
            [(None, "cannot be read"), (Some(b"{".as_slice()), "is not a tokenizer.json")]
        {
            let folder = folder(tokenizer);
            let failure = Specification::load(&folder.path().join("run.toml")).unwrap_err();
            assert_eq!(failure.exit_code(), 2);
            let text = failure.to_string();
            assert!(
                text.contains("has 1 problem:\n  tokenizer.path names ") && text.contains(expected),
                "{text}"
            );
        }
    }

    #[test]
    fn the_tokenizers_problem_is_listed_with_all_others() {
        let folder = folder(None);
        let path = folder.path().join("run.toml");
        std::fs::write(&path, SPEC.replace("rounds = 2", "rounds = 0")).unwrap();
        let problems = Specification::read(&path).unwrap().unwrap_err();
        let paths: Vec<&str> = problems.iter().map(|problem| problem.path.as_str()).collect();
        assert_eq!(paths, ["rounds", "tokenizer.path"]);
    }

    #[test]
    fn every_problem_is_listed_under_its_path() {
        let problems = [
            Problem { path: "rounds".into(), message: "is 0".into() },
            Problem { path: String::new(), message: "line one\nline two\n".into() },
        ];
        assert_eq!(
            problem_text(Path::new("run.toml"), &problems),
            "the specification run.toml has 2 problems:\n  rounds is 0\n  line one\n    line two"
        );
        assert_eq!(invalid_document(&problems)["problems"][0]["path"], "rounds");
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let failure = Specification::load(Path::new("/nowhere/run.toml")).unwrap_err();
        assert_eq!(failure.exit_code(), 2);
        assert!(failure.to_string().contains("/nowhere/run.toml"), "{failure}");
    }
}
