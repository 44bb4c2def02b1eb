//! The thread that owns every tensor. Others hand it jobs, which it does one after the other.
//!
//! A panic in a job ends the job, not the thread: the trainer is dropped, whose state is unknown then, and
//! the next job builds one anew.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    thread::JoinHandle,
};

use tokio::sync::{mpsc, oneshot};

use super::{Trainer, set_threads};

/// Jobs that wait at most; who hands in a further one waits.
const JOBS_MAX: usize = 4;

type Job = Box<dyn FnOnce(&mut Option<Trainer>) + Send>;

/// The trainer's thread. To end it, [`Worker::stop`]; if merely dropped, it ends after the jobs handed in.
pub struct Worker {
    jobs: mpsc::Sender<Job>,
    thread: JoinHandle<()>,
}

/// Why a job gave no result.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A defect of this program. The trainer was dropped.
    #[error("the trainer's job panicked: {0}; the trainer will be built anew")]
    Panicked(String),
    /// The thread has ended.
    #[error("the trainer's thread has ended")]
    Gone,
}

impl Worker {
    /// Starts the thread; `threads` as in [`set_threads`].
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn spawn(threads: usize) -> std::io::Result<Self> {
        let (jobs, mut queue) = mpsc::channel::<Job>(JOBS_MAX);
        let thread = std::thread::Builder::new().name("trainer".to_owned()).spawn(move || {
            set_threads(threads);
            let mut trainer = None;
            while let Some(job) = queue.blocking_recv() {
                job(&mut trainer);
            }
        })?;
        Ok(Self { jobs, thread })
    }

    /// Does `job` on the thread and returns its result. The trainer is there for the job to build, use or
    /// drop, and stays from job to job. Who no longer waits for the result does not stop the job.
    ///
    /// # Errors
    /// The job panicked, or the thread has ended.
    pub async fn run<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Option<Trainer>) -> R + Send + 'static,
    ) -> Result<R, WorkerError> {
        self.begin(job).await?.await.map_err(|_| WorkerError::Gone)?
    }

    /// Hands in `job`, as [`Worker::run`], and returns where its result will be; who does not care for that can drop
    /// it.
    ///
    /// # Errors
    /// The thread has ended.
    pub async fn begin<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Option<Trainer>) -> R + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<R, WorkerError>>, WorkerError> {
        let (reply, result) = oneshot::channel();
        let job: Job = Box::new(move |trainer| {
            // The only state that a panic can leave half changed is dropped.
            let outcome = catch_unwind(AssertUnwindSafe(|| job(trainer))).map_err(|panic| {
                *trainer = None;
                WorkerError::Panicked(panic_message(panic.as_ref()))
            });
            // Whoever asked may have gone.
            let _ = reply.send(outcome);
        });
        self.jobs.send(job).await.map_err(|_| WorkerError::Gone)?;
        Ok(result)
    }

    /// Ends the thread after the jobs handed in, and waits for it: libtorch must not be at work when the
    /// process ends.
    pub async fn stop(self) {
        drop(self.jobs);
        // The thread's panics are caught; that it cannot be joined leaves nothing to do.
        let _ = tokio::task::spawn_blocking(move || self.thread.join()).await;
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned()
}

#[cfg(test)]
mod tests {
    use consort_common::{
        model::{Architecture, LlamaConfig},
        spec::TrainingSpec,
    };

    use super::{super::test_device, *};

    fn build() -> Trainer {
        let architecture =
            Architecture::Llama(LlamaConfig { num_hidden_layers: 1, ..LlamaConfig::default() });
        Trainer::new(&architecture, &TrainingSpec::default(), 1, 0, test_device()).unwrap()
    }

    #[tokio::test]
    async fn the_trainer_stays_from_job_to_job() {
        let worker = Worker::spawn(1).unwrap();
        let count = worker.run(|trainer| trainer.insert(build()).parameters().unwrap().len()).await.unwrap();
        let again =
            worker.run(|trainer| trainer.as_ref().unwrap().parameters().unwrap().len()).await.unwrap();
        assert_eq!(count, again);
        worker.stop().await;
    }

    #[tokio::test]
    async fn a_panicking_job_is_an_error_and_the_next_job_finds_no_trainer() {
        let worker = Worker::spawn(1).unwrap();
        worker.run(|trainer| *trainer = Some(build())).await.unwrap();
        let error = worker.run(|_| -> () { panic!("a defect in {}", "the job") }).await.unwrap_err();
        assert!(error.to_string().contains("a defect in the job"), "{error}");
        assert!(worker.run(|trainer| trainer.is_none()).await.unwrap());
        worker.stop().await;
    }

    #[tokio::test]
    async fn a_panic_inside_libtorch_is_contained() {
        let worker = Worker::spawn(1).unwrap();
        let job = |_: &mut Option<Trainer>| {
            tch::Tensor::from_slice(&[1.0, 2.0]) + tch::Tensor::from_slice(&[1.0; 3])
        };
        assert!(matches!(worker.run(job).await, Err(WorkerError::Panicked(_))));
        worker.stop().await;
    }

    #[tokio::test]
    async fn a_job_whose_asker_has_gone_is_done_nevertheless() {
        let worker = Worker::spawn(1).unwrap();
        let (done, was_done) = oneshot::channel();
        let (started, was_started) = oneshot::channel();
        let (go_on, wait) = std::sync::mpsc::channel::<()>();
        {
            let job = worker.run(move |_| {
                started.send(()).unwrap();
                wait.recv().unwrap();
                done.send(()).unwrap();
            });
            tokio::select! {
                biased;
                _ = job => panic!("it waits"),
                _ = was_started => {}
            }
        }
        go_on.send(()).unwrap();
        was_done.await.unwrap();
        worker.stop().await;
    }
}
