//! The checkpoint that a specification starts from, and what it says of the specification.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use consort_common::{
    checkpoint::CheckpointReader,
    spec::{RunSpec, StartingPoint},
};

/// A checkpoint to start from.
pub(super) struct Start {
    pub(super) directory: PathBuf,
    checkpoint: CheckpointReader,
    point: StartingPoint,
    /// Empty before [`Start::with_parameters`].
    pub(super) parameters: Vec<f32>,
    /// With the sections that it leaves to the checkpoint.
    pub(super) specification: String,
}

impl Start {
    /// The directory that the specification at `path`, whose text is `toml`, names.
    pub(super) fn named(path: &Path, toml: &str) -> Option<PathBuf> {
        RunSpec::start_checkpoint(toml).map(|named| path.parent().unwrap_or(Path::new(".")).join(named))
    }

    /// Reads all but the weights.
    pub(super) fn open(directory: PathBuf, toml: &str) -> Result<Self> {
        let attempt = || attempt(&directory);
        let checkpoint = CheckpointReader::open(&directory).with_context(attempt)?;
        let point = StartingPoint {
            architecture: checkpoint.architecture().clone(),
            tokenizer: serde_json::from_str(checkpoint.tokenizer_json()).with_context(attempt)?,
            end_of_text: checkpoint.end_of_text().to_owned(),
        };
        let tokenizer = std::path::absolute(&directory).with_context(attempt)?.join("tokenizer.json");
        let specification = point.complete(toml, &tokenizer.display().to_string());
        Ok(Self { directory, checkpoint, point, parameters: Vec::new(), specification })
    }

    /// The same with the weights.
    pub(super) fn with_parameters(mut self) -> Result<Self> {
        let parameters = usize::try_from(self.point.architecture.manifest().parameters())?;
        self.parameters = vec![0.0; parameters];
        let read = self.checkpoint.fill(0, &mut self.parameters);
        read.with_context(|| attempt(&self.directory))?;
        Ok(self)
    }

    /// That the specification keeps documents apart where the checkpoint's training did not, or the other way round, in
    /// words. Which of both is meant the specification alone says, as of all that is trained with.
    pub(super) fn other_document_mask(&self, spec: &RunSpec) -> Option<String> {
        let (theirs, ours) = (self.checkpoint.document_mask()?, spec.training.document_mask);
        (theirs != ours).then(|| {
            let directory = self.directory.display();
            format!("training.document_mask is {ours}; {directory} was trained with {theirs}")
        })
    }

    /// Refuses a specification that is not the checkpoint's.
    pub(super) fn check(&self, spec: &RunSpec, tokenizer_json: &str) -> Result<()> {
        let problems = self.point.problems(spec, Some(&serde_json::from_str(tokenizer_json)?));
        if problems.is_empty() {
            return Ok(());
        }
        let problems: Vec<String> = problems.iter().map(|problem| format!("\n  {problem}")).collect();
        bail!(
            "cannot start from {}, which the specification does not fit:{}",
            self.directory.display(),
            problems.concat()
        )
    }
}

fn attempt(directory: &Path) -> String {
    format!("cannot start from the checkpoint {}", directory.display())
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs};

    use consort_common::{
        checkpoint,
        model::{Architecture, LlamaConfig},
        tokenizer::{BYTE_END_OF_TEXT_ID, byte_tokenizer_json},
    };

    use super::*;
    use crate::cli::data::PrepareArguments;

    /// Runs `data prepare` with a specification that starts from a checkpoint of LLaMA with another end of text
    /// than the built-in tokenizer's, and has these lines too; what it left in the cache.
    fn prepare(lines: &str) -> Result<Vec<PathBuf>> {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            prepare: PrepareArguments,
        }

        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let config = LlamaConfig { hidden_size: 16, num_hidden_layers: 1, ..LlamaConfig::default() };
        let architecture = Architecture::Llama(config);
        let flat = architecture.manifest().initialise(1);
        let tokenizer = byte_tokenizer_json().replace("<|endoftext|>", "</s>");
        let (end, id) = ("</s>", BYTE_END_OF_TEXT_ID);
        let metadata = BTreeMap::from([(checkpoint::DOCUMENT_MASK.to_owned(), "true".to_owned())]);
        checkpoint::write(&path("model"), &architecture, &flat, &tokenizer, end, id, &metadata).unwrap();
        let toml = format!("name = \"a\"\nrounds = 1\nstart.checkpoint = \"model\"\n{lines}");
        fs::write(path("run.toml"), &toml).unwrap();
        let text: String = (0..4000).map(|line| format!("This is line {line} of the text. ")).collect();
        fs::write(path("text.txt"), text).unwrap();

        let named = Start::named(&path("run.toml"), &toml).unwrap();
        assert_eq!(named, path("model"));
        let start = Start::open(named, &toml).unwrap().with_parameters().unwrap();
        assert_eq!(start.parameters, flat);
        if lines.is_empty() {
            let mut spec = RunSpec::parse(&start.specification).unwrap();
            let told = start.other_document_mask(&spec).unwrap();
            assert!(told.contains("document_mask is false") && told.contains("with true"), "{told}");
            spec.training.document_mask = true;
            assert_eq!(start.other_document_mask(&spec), None);
        }

        let arguments = ["run.toml", "--data", "text.txt", "--cache", "cache"];
        let arguments = arguments.map(|argument| match argument.starts_with("--") {
            true => argument.into(),
            false => path(argument).into_os_string(),
        });
        let arguments = std::iter::once("prepare".into()).chain(arguments);
        <Command as clap::Parser>::try_parse_from(arguments)?.prepare.run()?;
        Ok(fs::read_dir(path("cache"))?.map(|entry| entry.unwrap().path()).collect())
    }

    #[test]
    fn text_is_prepared_for_the_checkpoint_that_the_specification_names() {
        assert!(!prepare("").unwrap().is_empty());
        for (lines, key) in [
            ("[tokenizer]\nkind = \"byte\"\n", "tokenizer"),
            ("[model]\narchitecture = \"gpt2\"\n", "model."),
        ] {
            let error = prepare(lines).unwrap_err().to_string();
            assert!(error.contains("cannot start from") && error.contains(key), "{error}");
        }
    }
}
