//! Does what the newest instruction says, and nothing else: starts work, leaves it running while
//! instructions ask for the same, stops it when they ask for something else. Work that fails is tried
//! again for as long as it is asked for.

use std::{future::Future, sync::Arc};

use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use crate::{
    backoff::{Backoff, WORK},
    work::{Work, WorkError},
};

/// The newest instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The session in which it came.
    pub generation: u64,
    /// The work, if there is any.
    pub work: Option<Work>,
}

/// What to do about a new instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    /// Nothing.
    Keep,
    /// Stop what runs.
    Stop,
    /// Stop what runs, if anything does, and start what is asked for.
    Start,
}

/// The work of the last instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Current {
    work: Work,
    /// The newest session in which it was asked for.
    generation: u64,
    finished: bool,
}

/// Pure: the rules of this module's head.
fn decide(current: Option<&Current>, standing: &Standing) -> Decision {
    match (current, &standing.work) {
        (None, None) => Decision::Keep,
        (Some(_), None) => Decision::Stop,
        (None, Some(_)) => Decision::Start,
        (Some(current), Some(work)) if !current.work.is_same(work) => Decision::Start,
        (Some(current), Some(_)) if !current.finished => Decision::Keep,
        // Done, and asked for again in the same session: the instruction crossed our report on its way.
        // In a new session the aggregator has lost the report, so that it is made again.
        (Some(current), Some(_)) if current.generation == standing.generation => Decision::Keep,
        (Some(_), Some(_)) => Decision::Start,
    }
}

struct Running {
    current: Current,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    async fn stop(self) {
        self.cancel.cancel();
        if let Err(error) = self.task.await {
            error!("an internal failure while stopping {}: {error}", self.current.work);
        }
    }
}

/// Follows instructions until `shutdown`; then stops what runs, which keeps its checkpoint, and returns.
/// `perform` does one piece of work until its end or until it is cancelled.
pub async fn supervise<P, Performed>(
    mut standings: watch::Receiver<Option<Standing>>,
    shutdown: CancellationToken,
    perform: P,
) where
    P: Fn(Work, CancellationToken) -> Performed + Send + Sync + 'static,
    Performed: Future<Output = Result<(), WorkError>> + Send + 'static,
{
    let perform = Arc::new(perform);
    let mut running: Option<Running> = None;
    while let Some(Ok(())) = shutdown.run_until_cancelled(standings.changed()).await {
        let Some(standing) = standings.borrow_and_update().clone() else { continue };
        if let Some(running) = &mut running {
            running.current.finished = running.task.is_finished();
        }
        match decide(running.as_ref().map(|running| &running.current), &standing) {
            Decision::Keep => {
                if let Some(running) = &mut running {
                    running.current.generation = standing.generation;
                }
            }
            Decision::Stop => stop(&mut running).await,
            Decision::Start => {
                stop(&mut running).await;
                running = standing.work.map(|work| start(work, standing.generation, &perform));
            }
        }
    }
    stop(&mut running).await;
}

async fn stop(running: &mut Option<Running>) {
    if let Some(running) = running.take() {
        running.stop().await;
    }
}

fn start<P, Performed>(work: Work, generation: u64, perform: &Arc<P>) -> Running
where
    P: Fn(Work, CancellationToken) -> Performed + Send + Sync + 'static,
    Performed: Future<Output = Result<(), WorkError>> + Send + 'static,
{
    info!("{work}: starting");
    let cancel = CancellationToken::new();
    let task = tokio::spawn(repeat(work.clone(), cancel.clone(), perform.clone()));
    Running { current: Current { work, generation, finished: false }, cancel, task }
}

/// Performs until it succeeds or is cancelled.
async fn repeat<P, Performed>(work: Work, cancel: CancellationToken, perform: Arc<P>)
where
    P: Fn(Work, CancellationToken) -> Performed,
    Performed: Future<Output = Result<(), WorkError>> + Send + 'static,
{
    let mut backoff = Backoff::new(WORK);
    loop {
        // A task of its own, so that a panic is one more way to fail.
        let performed = tokio::spawn(perform(work.clone(), cancel.clone())).await;
        let error = match performed.map_err(|error| WorkError::Internal(error.to_string())).flatten() {
            Ok(()) => return info!("{work}: done"),
            Err(WorkError::Cancelled) => return info!("{work}: stopped"),
            Err(error) => error,
        };
        let wait = backoff.next(&mut rand::rng());
        error!("{work}: failed: {error}; next try in {:.0} s", wait.as_secs_f64().ceil());
        if cancel.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use consort_common::ids::Digest;
    use tokio::sync::mpsc;

    use super::*;
    use crate::work::RunId;

    fn work(name: &str) -> Work {
        Work::Prepare(RunId { name: name.parse().unwrap(), spec_digest: Digest::of(b"") })
    }

    fn standing(generation: u64, name: Option<&str>) -> Standing {
        Standing { generation, work: name.map(work) }
    }

    fn check(current: Option<(&str, u64, bool)>, instruction: (u64, Option<&str>), expected: Decision) {
        let current =
            current.map(|(name, generation, finished)| Current { work: work(name), generation, finished });
        let decision = decide(current.as_ref(), &standing(instruction.0, instruction.1));
        assert_eq!(decision, expected, "{current:?} {instruction:?}");
    }

    #[test]
    fn work_is_kept_while_it_is_asked_for() {
        check(None, (1, None), Decision::Keep);
        check(None, (1, Some("a")), Decision::Start);
        check(Some(("a", 1, false)), (1, Some("a")), Decision::Keep);
        check(Some(("a", 1, false)), (2, Some("a")), Decision::Keep);
        check(Some(("a", 1, false)), (1, Some("b")), Decision::Start);
        check(Some(("a", 1, false)), (1, None), Decision::Stop);
    }

    #[test]
    fn finished_work_is_done_again_only_in_a_new_session() {
        check(Some(("a", 1, true)), (1, Some("a")), Decision::Keep);
        check(Some(("a", 1, true)), (2, Some("a")), Decision::Start);
        check(Some(("a", 1, true)), (1, Some("b")), Decision::Start);
        check(Some(("a", 1, true)), (1, None), Decision::Stop);
    }

    /// Runs a supervisor whose work reports "name", then waits for its cancellation and reports "-name".
    fn supervised()
    -> (watch::Sender<Option<Standing>>, CancellationToken, mpsc::UnboundedReceiver<String>, JoinHandle<()>)
    {
        let (standings, receiver) = watch::channel(None);
        let (events, reported) = mpsc::unbounded_channel();
        let shutdown = CancellationToken::new();
        let supervisor = supervise(receiver, shutdown.clone(), move |work, cancel| {
            let events = events.clone();
            async move {
                let Work::Prepare(run) = work else { panic!("{work:?}") };
                events.send(run.name.to_string()).unwrap();
                cancel.cancelled().await;
                events.send(format!("-{}", run.name)).unwrap();
                Err(WorkError::Cancelled)
            }
        });
        (standings, shutdown, reported, tokio::spawn(supervisor))
    }

    #[tokio::test]
    async fn one_piece_of_work_ends_before_the_next_begins_and_shutdown_ends_the_last() {
        let (standings, shutdown, mut reported, supervisor) = supervised();
        let mut expect = async |event: &str| assert_eq!(reported.recv().await.unwrap(), event);
        standings.send_replace(Some(standing(1, Some("a"))));
        expect("a").await;
        standings.send_replace(Some(standing(2, Some("a"))));
        standings.send_replace(Some(standing(2, Some("b"))));
        expect("-a").await;
        expect("b").await;
        shutdown.cancel();
        expect("-b").await;
        supervisor.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_fails_or_panics_is_tried_again() {
        let (standings, receiver) = watch::channel(None);
        let (done, mut reported) = mpsc::unbounded_channel();
        let tries = Arc::new(Mutex::new(0));
        let shutdown = CancellationToken::new();
        let supervisor = tokio::spawn(supervise(receiver, shutdown.clone(), move |_, _| {
            let (tries, done) = (tries.clone(), done.clone());
            async move {
                let number = {
                    let mut tries = tries.lock().unwrap();
                    *tries += 1;
                    *tries
                };
                match number {
                    1 => Err(WorkError::Internal("first".to_owned())),
                    2 => panic!("second"),
                    number => {
                        done.send(number).unwrap();
                        Ok(())
                    }
                }
            }
        }));
        standings.send_replace(Some(standing(1, Some("a"))));
        assert_eq!(reported.recv().await, Some(3));
        shutdown.cancel();
        supervisor.await.unwrap();
    }
}
