//! `consort checkpoints`: published models, and fetching one as a directory that `transformers` loads.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use consort_common::{
    atomic_file::{create_partial_directory, rename_directory_into_place},
    ids::RunName,
    units,
};
use consort_proto::v1;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::tz::TimeZone;
use serde_json::json;

use crate::{
    Context,
    connection::{Operator, reply},
    failure::Failure,
    json,
    output::Output,
    receive::{ReceiveError, Receiver},
    table::{Column, Table},
    words,
};

/// List and fetch the models that a run has published
#[derive(Debug, Subcommand)]
pub enum CheckpointsCommand {
    /// List the checkpoints of a run
    #[command(after_help = "Example:\n  consort checkpoints list demo")]
    List {
        /// Name of the run
        run: RunName,
    },
    /// Fetch a checkpoint as a Hugging Face directory
    #[command(after_help = "Example:\n  consort checkpoints get demo --out demo-model")]
    Get {
        /// Name of the run
        run: RunName,
        /// Version of the model: the round that made it [default: the newest]
        #[arg(long, value_name = "N")]
        version: Option<u32>,
        /// The directory to make; it must not exist, or be empty
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

/// Does what the command says.
pub async fn run(context: &Context, command: CheckpointsCommand) -> Result<(), Failure> {
    match command {
        CheckpointsCommand::List { run } => {
            let checkpoints = list(&mut context.operator().await?, &run).await?;
            let document = json::list("checkpoints", &checkpoints, json::checkpoint);
            context.output.show(&document, &list_lines(&checkpoints, &context.output, &TimeZone::system()))
        }
        CheckpointsCommand::Get { run, version, out } => get(context, &run, version, &out).await,
    }
}

async fn list(operator: &mut Operator, run: &RunName) -> Result<Vec<v1::Checkpoint>, Failure> {
    let request = v1::ListCheckpointsRequest { run: run.to_string() };
    let attempt = format!("list the checkpoints of the run {run}");
    Ok(reply(&attempt, operator.list_checkpoints(request)).await?.checkpoints)
}

async fn get(context: &Context, run: &RunName, version: Option<u32>, out: &Path) -> Result<(), Failure> {
    let out = check_target(out)?;
    let mut operator = context.operator().await?;
    let checkpoints = list(&mut operator, run).await?;
    let checkpoint = choose(&checkpoints, run, version)?;
    let files = download(&mut operator, run, checkpoint, &out).await?;
    let document = json!({ "checkpoint": json::checkpoint(checkpoint), "directory": out, "files": files });
    let line = format!(
        "Wrote version {} of the run {run} ({}, {}) to {}.",
        checkpoint.version,
        words::plural(files, "file"),
        units::bytes(checkpoint.bytes),
        out.display()
    );
    context.output.show(&document, &[line])
}

/// The directory's full path, if it can be made without touching anything that exists.
fn check_target(out: &Path) -> Result<PathBuf, Failure> {
    let refused = |reason: &str| {
        Failure::Usage(format!(
            "cannot write the checkpoint to {}: {reason}; choose another --out DIR",
            out.display()
        ))
    };
    let path = std::path::absolute(out).map_err(|error| refused(&error.to_string()))?;
    if path.file_name().is_none() {
        return Err(refused("it does not end with a name"));
    }
    match std::fs::read_dir(&path).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(path),
        Ok(false) => Err(refused("it exists and is not empty")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(path),
        Err(error) => Err(refused(&error.to_string())),
    }
}

fn choose<'a>(
    checkpoints: &'a [v1::Checkpoint],
    run: &RunName,
    version: Option<u32>,
) -> Result<&'a v1::Checkpoint, Failure> {
    let chosen = match version {
        Some(version) => checkpoints.iter().find(|checkpoint| checkpoint.version == version),
        None => checkpoints.iter().max_by_key(|checkpoint| checkpoint.version),
    };
    chosen.ok_or_else(|| {
        let versions: Vec<String> =
            checkpoints.iter().map(|checkpoint| checkpoint.version.to_string()).collect();
        Failure::NotFound(match (versions.as_slice(), version) {
            ([], _) => format!("the run {run} has no checkpoint yet"),
            (versions, version) => format!(
                "the run {run} has no checkpoint of version {}; there are: {}",
                version.unwrap_or_default(),
                versions.join(", ")
            ),
        })
    })
}

/// Fetches into a folder beside `out` and renames it at the end: `out` is whole or not there.
async fn download(
    operator: &mut Operator,
    run: &RunName,
    checkpoint: &v1::Checkpoint,
    out: &Path,
) -> Result<usize, Failure> {
    let attempt = format!("fetch version {} of the run {run}", checkpoint.version);
    let failed = |error: &dyn std::fmt::Display| Failure::Refused(format!("cannot {attempt}: {error}"));
    let folder = create_partial_directory(out).map_err(|error| failed(&error))?;
    let request = v1::DownloadCheckpointRequest { run: run.to_string(), version: Some(checkpoint.version) };
    let received = receive(operator, request, &folder, &attempt, checkpoint.bytes).await;
    let published = received.and_then(|files| {
        rename_directory_into_place(&folder, out).map(|()| files).map_err(|error| failed(&error))
    });
    if published.is_err() {
        // Gives the space back; the failure itself is what to report.
        let _ = std::fs::remove_dir_all(&folder);
    }
    published
}

async fn receive(
    operator: &mut Operator,
    request: v1::DownloadCheckpointRequest,
    folder: &Path,
    attempt: &str,
    total_bytes: u64,
) -> Result<usize, Failure> {
    let from_status = |status| Failure::from_status(attempt, &status);
    let refused = |error: ReceiveError| Failure::Refused(format!("cannot {attempt}: {error}"));
    let progress = progress_bar(total_bytes);
    let mut receiver = Receiver::new(folder);
    let mut received_bytes = 0;
    // No timeout: the connection's keepalive ends it when the aggregator is gone; slow is not gone.
    let mut parts = operator.download_checkpoint(request).await.map_err(from_status)?.into_inner();
    while let Some(part) = parts.message().await.map_err(from_status)? {
        receiver.take(&part).map_err(refused)?;
        received_bytes += part.data.len() as u64;
        progress.inc(part.data.len() as u64);
    }
    progress.finish_and_clear();
    // A stream that the aggregator cut between two files ends like one that is complete.
    if received_bytes < total_bytes {
        return Err(Failure::Refused(format!(
            "cannot {attempt}: only {received_bytes} of {total_bytes} bytes came; try again"
        )));
    }
    receiver.finish().map_err(refused)
}

/// On standard error, where that is a terminal; else nothing.
pub fn progress_bar(total_bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix}{wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
    );
    ProgressBar::new(total_bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn list_lines(checkpoints: &[v1::Checkpoint], output: &Output, zone: &TimeZone) -> Vec<String> {
    let mut table = Table::new([
        Column::number("VERSION"),
        Column::words("CREATED"),
        Column::number("SIZE"),
        Column::words("MODEL"),
        Column::words("DIRECTORY ON THE AGGREGATOR").optional(1),
    ]);
    for checkpoint in checkpoints {
        table.row([
            checkpoint.version.to_string(),
            words::date(checkpoint.created_unix_ms, zone),
            units::bytes(checkpoint.bytes),
            words::short_digest(&checkpoint.digest),
            checkpoint.path.clone(),
        ]);
    }
    table.render(output.columns, output.paint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fake_operator::{FakeOperator, Script},
        text::Paint,
    };

    fn checkpoint(version: u32, path: &str) -> v1::Checkpoint {
        v1::Checkpoint {
            run: "demo".into(),
            version,
            path: path.into(),
            bytes: 4_200_000,
            created_unix_ms: 1_700_000_000_000,
            digest: vec![0xAB; 32],
        }
    }

    #[test]
    fn the_list_leaves_out_paths_that_do_not_fit() {
        let output = Output { json: false, columns: 80, paint: Paint { colours: false } };
        let lines = |path: &str| list_lines(&[checkpoint(3, path)], &output, &TimeZone::UTC);
        assert_eq!(
            lines("/srv/demo/3"),
            [
                "VERSION  CREATED                 SIZE  MODEL         DIRECTORY ON THE AGGREGATOR",
                "      3  2023-11-14 22:13:20  4.20 MB  abababababab  /srv/demo/3",
            ]
        );
        assert_eq!(lines(&"x".repeat(100))[0], "VERSION  CREATED                 SIZE  MODEL");
    }

    #[test]
    fn the_newest_is_taken_unless_a_version_is_asked_for() {
        let run: RunName = "demo".parse().unwrap();
        let checkpoints = [checkpoint(2, ""), checkpoint(10, ""), checkpoint(9, "")];
        assert_eq!(choose(&checkpoints, &run, None).unwrap().version, 10);
        assert_eq!(choose(&checkpoints, &run, Some(9)).unwrap().version, 9);
        let failure = choose(&checkpoints, &run, Some(3)).unwrap_err();
        assert_eq!(failure.exit_code(), 4);
        assert_eq!(failure.to_string(), "the run demo has no checkpoint of version 3; there are: 2, 10, 9");
        assert_eq!(choose(&[], &run, None).unwrap_err().to_string(), "the run demo has no checkpoint yet");
    }

    #[test]
    fn what_exists_is_never_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        assert_eq!(check_target(&path("new")).unwrap(), path("new"));
        std::fs::create_dir(path("empty")).unwrap();
        assert!(check_target(&path("empty")).is_ok());
        std::fs::write(path("file"), "").unwrap();
        for taken in [path("file"), folder.path().to_owned(), PathBuf::from("/"), PathBuf::from("..")] {
            assert_eq!(check_target(&taken).unwrap_err().exit_code(), 2, "{}", taken.display());
        }
    }

    async fn fetch(parts: Vec<Result<v1::FilePart, tonic::Status>>, out: &Path) -> Result<usize, Failure> {
        let (_fake, mut operator, _server) = FakeOperator::serve(Script { parts, ..Script::default() }).await;
        let checkpoint = v1::Checkpoint { bytes: 5, ..checkpoint(3, "") };
        download(&mut operator, &"demo".parse().unwrap(), &checkpoint, out).await
    }

    fn part(name: &str, file_bytes: u64, data: &'static [u8]) -> Result<v1::FilePart, tonic::Status> {
        Ok(v1::FilePart { name: name.into(), file_bytes, offset: 0, data: data.into() })
    }

    #[tokio::test]
    async fn a_checkpoint_is_there_whole() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("model");
        let files =
            fetch(vec![part("config.json", 2, b"{}"), part("model.safetensors", 3, b"abc")], &out).await;
        assert_eq!(files.unwrap(), 2);
        assert_eq!(std::fs::read(out.join("model.safetensors")).unwrap(), b"abc");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_stream_that_ends_between_two_files_is_no_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let result = fetch(vec![part("config.json", 2, b"{}")], &folder.path().join("model")).await;
        assert!(result.unwrap_err().to_string().contains("2 of 5 bytes"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_checkpoint_that_is_cut_or_leads_elsewhere_leaves_nothing_behind() {
        for (second, exit_code) in [
            (part("model.safetensors", 4, b"abc"), 1),
            (part("../stolen", 1, b"x"), 1),
            (Err(tonic::Status::unavailable("gone")), 3),
            (Err(tonic::Status::not_found("was removed")), 4),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let result =
                fetch(vec![part("config.json", 2, b"{}"), second], &folder.path().join("model")).await;
            assert_eq!(result.unwrap_err().exit_code(), exit_code);
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }
}
