//! The protocol's messages as JSON documents, for scripts. Pure.
//!
//! Field names are the protocol's, in snake case; enumerations are lower-case words with `_`; digests are
//! hexadecimal; `*_unix_ms` are milliseconds since 1970; what is absent, zero-for-never or not a finite
//! number is `null`. Fields may be added; none is renamed or removed within a protocol version.

use consort_proto::v1;
use serde_json::{Value, json};

use crate::words;

fn digest(bytes: &[u8]) -> Value {
    consort_common::ids::Digest::try_from(bytes).map_or(Value::Null, |digest| json!(digest.to_string()))
}

fn moment(unix_ms: u64) -> Value {
    if unix_ms == 0 { Value::Null } else { json!(unix_ms) }
}

fn word(word: &str) -> Value {
    json!(word.replace(' ', "_"))
}

/// `document` with further fields.
fn with(mut document: Value, fields: Value) -> Value {
    if let (Value::Object(document), Value::Object(fields)) = (&mut document, fields) {
        document.extend(fields);
    }
    document
}

/// A list of documents under one name.
pub fn list<T>(name: &str, items: &[T], item: impl Fn(&T) -> Value) -> Value {
    json!({ name: items.iter().map(item).collect::<Vec<_>>() })
}

/// A run in short.
pub fn run_summary(run: &v1::RunSummary) -> Value {
    json!({
        "name": run.name,
        "status": word(words::run_status(run.status())),
        "round": run.round,
        "rounds": run.rounds,
        "phase": word(words::phase(run.phase())),
        "architecture": run.architecture,
        "parameters": run.parameters,
        "tokens": run.tokens,
        "bytes_down": run.bytes_down,
        "bytes_up": run.bytes_up,
        "created_unix_ms": moment(run.created_unix_ms),
        "started_unix_ms": moment(run.started_unix_ms),
        "finished_unix_ms": moment(run.finished_unix_ms),
        "validation_loss": run.validation_loss,
        "validation_perplexity": run.validation_loss.map(f64::exp),
    })
}

/// A run, whole.
pub fn run(run: &v1::GetRunResponse) -> Value {
    with(
        run.run.as_ref().map_or_else(|| json!({}), run_summary),
        json!({
            "spec_toml": run.spec_toml,
            "spec_digest": digest(&run.spec_digest),
            "manifest_digest": digest(&run.manifest_digest),
            "version": run.version,
            "version_digest": digest(&run.version_digest),
            "start": run.start.as_ref().map(
                |start| json!({ "origin": start.origin, "digest": digest(&start.digest) })
            ),
            "reason": if run.reason.is_empty() { Value::Null } else { json!(run.reason) },
        }),
    )
}

/// A committed round in short.
pub fn round_summary(round: &v1::RoundSummary) -> Value {
    json!({
        "round": round.round,
        "started_unix_ms": moment(round.started_unix_ms),
        "committed_unix_ms": moment(round.committed_unix_ms),
        "attempts": round.attempts,
        "contributors": round.contributors,
        "tokens": round.tokens,
        "train_loss": round.train_loss,
        "delta_norm": round.delta_norm,
        "update_norm": round.update_norm,
        "parameter_norm": round.statistics.map(|statistics| statistics.parameter_norm),
        "momentum_norm": round.statistics.and_then(|statistics| statistics.momentum_norm),
        "update_cosine": round.statistics.and_then(|statistics| statistics.update_cosine),
        "spread": round.statistics.and_then(|statistics| statistics.spread),
        "validation_loss": round.validation_loss,
        "validation_perplexity": round.validation_loss.map(f64::exp),
        "bytes_down": round.bytes_down,
        "bytes_up": round.bytes_up,
        "digest": digest(&round.digest),
    })
}

/// A committed round with all that it takes to reproduce it.
pub fn round(run: &str, round: &v1::GetRoundResponse) -> Value {
    with(
        round.round.as_ref().map_or_else(|| json!({}), round_summary),
        json!({
            "run": run,
            "seed": round.seed,
            "aggregation": round.aggregation,
            "spec_digest": digest(&round.spec_digest),
            "manifest_digest": digest(&round.manifest_digest),
            "contributions": round.contributions.iter().map(contribution).collect::<Vec<_>>(),
            "evaluations": round.evaluations.iter().map(site_evaluation).collect::<Vec<_>>(),
            "tensors": round.tensors.iter().map(tensor_norms).collect::<Vec<_>>(),
        }),
    )
}

fn contribution(contribution: &v1::Contribution) -> Value {
    json!({
        "site": contribution.site,
        "weight": contribution.weight,
        "age": contribution.age,
        "tokens": contribution.tokens,
        "steps": contribution.steps,
        "train_loss": contribution.train_loss,
        "train_seconds": contribution.train_seconds,
        "delta_norm": contribution.delta_norm,
        "bytes": contribution.bytes,
        "delta_digest": digest(&contribution.delta_digest),
        "accepted_unix_ms": moment(contribution.accepted_unix_ms),
        "measured_norm": contribution.measured_norm,
        "clip": contribution.clip,
        "selected": contribution.selected,
    })
}

fn tensor_norms(tensor: &v1::TensorNorms) -> Value {
    json!({
        "name": tensor.name,
        "parameters": tensor.parameters,
        "delta_norm": tensor.delta_norm,
        "momentum_norm": tensor.momentum_norm,
        "parameter_norm": tensor.parameter_norm,
    })
}

fn site_evaluation(site: &v1::SiteEvaluation) -> Value {
    let evaluation = site.evaluation.unwrap_or_default();
    json!({
        "site": site.site,
        "version": evaluation.version,
        "loss": evaluation.loss,
        "perplexity": evaluation.loss.exp(),
        "tokens": evaluation.tokens,
        "text_bytes": evaluation.text_bytes,
    })
}

fn version_evaluation(evaluation: &v1::VersionEvaluation) -> Value {
    json!({
        "version": evaluation.version,
        "loss": evaluation.loss,
        "perplexity": evaluation.loss.exp(),
        "sites": evaluation.sites.iter().map(site_evaluation).collect::<Vec<_>>(),
    })
}

/// A client in short.
pub fn client_summary(client: &v1::ClientSummary) -> Value {
    json!({
        "site": client.site,
        "connected": client.connected,
        "participation": word(words::participation(client.participation())),
        "progress": client.progress.as_ref().map(progress),
        "device": client.device,
        "software_version": client.software_version,
        "first_seen_unix_ms": moment(client.first_seen_unix_ms),
        "last_seen_unix_ms": moment(client.last_seen_unix_ms),
        "train_tokens": client.train_tokens,
        "held_out_tokens": client.held_out_tokens,
        "ready": client.ready,
    })
}

fn progress(progress: &v1::Progress) -> Value {
    json!({
        "run": progress.run,
        "round": progress.round,
        "activity": word(words::activity(progress.activity())),
        "done": progress.done,
        "total": progress.total,
        "tokens_per_second": progress.tokens_per_second,
        "loss": progress.loss,
    })
}

/// A client with its newest contributions.
pub fn client(client: &v1::GetClientResponse) -> Value {
    let contributions = client.contributions.iter().map(|item| {
        let fields = json!({ "run": item.run, "round": item.round });
        with(fields, item.contribution.as_ref().map_or_else(|| json!({}), contribution))
    });
    with(
        client.client.as_ref().map_or_else(|| json!({}), client_summary),
        json!({ "contributions": contributions.collect::<Vec<_>>() }),
    )
}

/// A published checkpoint.
pub fn checkpoint(checkpoint: &v1::Checkpoint) -> Value {
    json!({
        "run": checkpoint.run,
        "version": checkpoint.version,
        "path": checkpoint.path,
        "bytes": checkpoint.bytes,
        "created_unix_ms": moment(checkpoint.created_unix_ms),
        "digest": digest(&checkpoint.digest),
    })
}

/// One look at a run.
pub fn snapshot(snapshot: &v1::RunSnapshot) -> Value {
    let event = |event: &v1::RunEvent| json!({ "id": event.id, "time_unix_ms": event.time_unix_ms, "text": event.text });
    json!({
        "run": snapshot.run.as_ref().map(run_summary),
        "waiting_for": snapshot.waiting_for,
        "deadline_unix_ms": moment(snapshot.deadline_unix_ms),
        "clients": snapshot.clients.iter().map(client_summary).collect::<Vec<_>>(),
        "evaluations": snapshot.evaluations.iter().map(version_evaluation).collect::<Vec<_>>(),
        "events": snapshot.events.iter().map(event).collect::<Vec<_>>(),
        "server_time_unix_ms": moment(snapshot.server_time_unix_ms),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys are sorted, so that the texts below do not depend on how serde_json keeps its maps.
    fn check(document: &Value, expected: &str) {
        let expected: Value = serde_json::from_str(expected).unwrap();
        assert_eq!(*document, expected);
    }

    #[test]
    fn a_run_says_null_where_there_is_nothing() {
        let summary = v1::RunSummary {
            name: "demo".into(),
            status: v1::RunStatus::Active.into(),
            phase: v1::Phase::Training.into(),
            round: 3,
            rounds: 20,
            created_unix_ms: 1_700_000_000_000,
            validation_loss: Some(0.0),
            architecture: "llama".into(),
            ..v1::RunSummary::default()
        };
        check(
            &run_summary(&summary),
            r#"{"name":"demo","status":"active","round":3,"rounds":20,"phase":"training","architecture":"llama",
                "parameters":0,"tokens":0,"bytes_down":0,"bytes_up":0,"created_unix_ms":1700000000000,
                "started_unix_ms":null,"finished_unix_ms":null,"validation_loss":0.0,"validation_perplexity":1.0}"#,
        );
    }

    #[test]
    fn a_contribution_has_its_digest_in_hexadecimal_and_no_number_that_is_none() {
        let document = contribution(&v1::Contribution {
            site: "books".into(),
            weight: 0.25,
            train_loss: f64::NAN,
            delta_digest: vec![0xAB; 32],
            ..v1::Contribution::default()
        });
        assert_eq!(document["delta_digest"], "ab".repeat(32));
        assert_eq!(document["train_loss"], Value::Null);
        assert_eq!(document["weight"], 0.25);
    }

    #[test]
    fn words_of_two_are_joined() {
        let client = v1::ClientSummary {
            participation: v1::Participation::NotSelected.into(),
            progress: Some(v1::Progress {
                activity: v1::ClientActivity::Idle.into(),
                ..v1::Progress::default()
            }),
            ..v1::ClientSummary::default()
        };
        let document = client_summary(&client);
        assert_eq!(document["participation"], "not_selected");
        assert_eq!(document["progress"]["activity"], "idle");
        assert_eq!(document["progress"]["loss"], Value::Null);
    }

    #[test]
    fn documents_are_one_line() {
        let mut run_response =
            v1::GetRunResponse { spec_toml: "a = 1\nb = 2\n".into(), ..v1::GetRunResponse::default() };
        run_response.run = Some(v1::RunSummary::default());
        for document in [
            run(&run_response),
            snapshot(&v1::RunSnapshot::default()),
            round("demo", &v1::GetRoundResponse::default()),
            client(&v1::GetClientResponse::default()),
            list("checkpoints", &[v1::Checkpoint::default()], checkpoint),
        ] {
            assert!(!document.to_string().contains('\n'));
        }
    }
}
