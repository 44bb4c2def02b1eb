//! From the engine's instruction to the message that a site gets.

use consort_common::ids::SiteName;
use consort_proto::v1::{self, instruction::Task};

use super::LiveRun;
use crate::{engine::Instruction, sessions::Daemon};

/// What `site`, where `daemon` runs, shall be doing, given the run that sites are to work for.
pub(super) fn for_site(current: Option<&LiveRun>, site: &SiteName, daemon: &Daemon) -> v1::Instruction {
    let task = match current {
        None => Task::Idle(v1::Idle { reason: "no run is active".to_owned() }),
        Some(live) => task(live, site, daemon),
    };
    v1::Instruction { task: Some(task) }
}

fn task(live: &LiveRun, site: &SiteName, daemon: &Daemon) -> Task {
    let material = &live.material;
    let run = material.name.to_string();
    let spec_digest = material.spec_digest.to_vec();
    let manifest_digest = material.manifest_digest.to_vec();
    match live.run.instruction(&material.rounds, site) {
        Instruction::Idle { reason } => Task::Idle(v1::Idle { reason }),
        Instruction::Prepare => Task::Prepare(v1::Prepare { run, spec_digest }),
        Instruction::Train { round, first_step, steps, tokens, deadline_ms, evaluate_base } => {
            let base_version = round.saturating_sub(1);
            let Some(base_digest) = live.digest(base_version) else {
                let reason =
                    format!("version {base_version}, which round {round} trains from, cannot be read");
                return Task::Idle(v1::Idle { reason });
            };
            Task::Train(v1::Train {
                run,
                spec_digest,
                manifest_digest,
                round,
                base_digest: base_digest.to_vec(),
                first_step,
                steps,
                tokens,
                deadline_unix_ms: deadline_ms.unwrap_or_default(),
                evaluate_base,
                delta_encoding: daemon.delta_encoding(material.spec.wire.delta_encoding).name().to_owned(),
            })
        }
        Instruction::Evaluate { version } => Task::Evaluate(v1::Evaluate {
            run,
            spec_digest,
            manifest_digest,
            version,
            digest: live.version_digest.to_vec(),
        }),
    }
}
