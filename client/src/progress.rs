//! What the site is doing, for the people who watch the run: the latest state, about once a second,
//! dropped when it cannot be sent. Nothing ever waits for it.

use std::time::Duration;

use consort_common::ids::RunName;
use consort_proto::v1::{ClientActivity, Progress, ReportProgressRequest};
use tokio::{sync::watch, time::Instant};
use tonic::Request;

use crate::link::Link;

/// Least time between two reports.
const INTERVAL: Duration = Duration::from_secs(1);
/// A report that takes longer is given up: the next one is newer.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Takes what the work says of itself.
#[derive(Debug, Clone)]
pub struct Reporter {
    latest: watch::Sender<Option<Progress>>,
}

/// One activity, whose progress is reported.
#[derive(Debug, Clone)]
pub struct Activity {
    reporter: Reporter,
    progress: Progress,
}

impl Default for Reporter {
    fn default() -> Self {
        Self { latest: watch::Sender::new(None) }
    }
}

impl Reporter {
    /// An activity that has `total` to do, in the activity's unit; 0 when that is not known.
    pub fn begin(&self, run: &RunName, round: u32, activity: ClientActivity, total: u64) -> Activity {
        let progress = Progress {
            run: run.to_string(),
            round,
            activity: activity.into(),
            done: 0,
            total,
            tokens_per_second: 0.0,
            loss: None,
        };
        self.latest.send_replace(Some(progress.clone()));
        Activity { reporter: self.clone(), progress }
    }

    /// Nothing is being done.
    pub fn idle(&self, run: &RunName) {
        self.begin(run, 0, ClientActivity::Idle, 0);
    }

    /// Sends reports for as long as it is polled.
    pub async fn run(&self, link: &Link) {
        let mut reports = self.latest.subscribe();
        while reports.changed().await.is_ok() {
            let progress = reports.borrow_and_update().clone();
            if let (Some(mut session), Some(progress)) = (link.current(), progress) {
                let message = ReportProgressRequest { session_id: session.id, progress: Some(progress) };
                let mut request = Request::new(message);
                request.set_timeout(CALL_TIMEOUT);
                let sent = Instant::now();
                match session.client.report_progress(request).await {
                    Ok(_) => session.round_trip.took(sent.elapsed()),
                    Err(status) => tracing::debug!("a progress report was dropped: {}", status.message()),
                }
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }
}

impl Activity {
    /// So much is done.
    pub fn done(&self, done: u64) {
        self.reporter.latest.send_replace(Some(Progress { done, ..self.progress.clone() }));
    }

    /// So much of so much is done.
    pub fn done_of(&self, done: u64, total: u64) {
        self.reporter.latest.send_replace(Some(Progress { done, total, ..self.progress.clone() }));
    }

    /// So many steps are done.
    pub fn trained(&self, steps: u64, tokens_per_second: f64, loss: Option<f64>) {
        let progress = Progress { done: steps, tokens_per_second, loss, ..self.progress.clone() };
        self.reporter.latest.send_replace(Some(progress));
    }
}
