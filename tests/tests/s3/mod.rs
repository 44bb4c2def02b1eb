//! A real S3 server: the crate `s3s-fs` over a directory, on a port that the system chose. It can be taken
//! down and brought back, and writes can be held or refused.

use std::{
    convert::Infallible,
    fs,
    io::ErrorKind,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn,
};
use hyper_util::rt::TokioIo;
use s3s::{Body, auth::SimpleAuth, service::S3Service, service::S3ServiceBuilder};
use s3s_fs::FileSystem;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

/// The only bucket.
pub const BUCKET: &str = "consort";
/// The credentials that the server takes.
pub const ACCESS_KEY: &str = "access";
/// Their secret.
pub const SECRET_KEY: &str = "secret";

/// What becomes of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It gets no answer, and is not stored.
    Held,
    /// The account has no room.
    Full,
}

/// What goes wrong, and how often it has.
#[derive(Debug, Default)]
struct Faults {
    /// For objects whose name has this in it.
    fault: Option<(String, Fault)>,
    hits: usize,
}

/// The server, with what it stores. Dropping it takes it down.
pub struct S3Server {
    address: SocketAddr,
    directory: TempDir,
    faults: Arc<Mutex<Faults>>,
    runtime: Option<Runtime>,
}

impl S3Server {
    /// Starts a server with the bucket [`BUCKET`].
    pub fn start() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        fs::create_dir(directory.path().join(BUCKET)).expect("the bucket can be made");
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a port");
        let address = listener.local_addr().expect("a listener has an address");
        let mut server = Self { address, directory, faults: Arc::default(), runtime: None };
        server.serve(listener);
        server
    }

    /// Takes the server down: its connections break, and new ones are refused.
    pub fn stop(&mut self) {
        self.runtime.take().expect("the server is up").shutdown_background();
    }

    /// Brings the server back at its address.
    pub fn restart(&mut self) {
        let listener =
            consort_tests::process::wait_for("the server's port", || match TcpListener::bind(self.address) {
                Err(error) if error.kind() == ErrorKind::AddrInUse => None,
                listener => Some(listener.expect("the port can be had again")),
            });
        self.serve(listener);
    }

    fn serve(&mut self, listener: TcpListener) {
        let files = FileSystem::new(self.directory.path()).expect("the directory can be served");
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let (service, faults) = (service.build(), self.faults.clone());
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime can be made");
        listener.set_nonblocking(true).expect("a listener can be made so");
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener can be used");
            loop {
                let (stream, _) = listener.accept().await.expect("connections can be taken");
                let (service, faults) = (service.clone(), faults.clone());
                let service = service_fn(move |request| answer(service.clone(), faults.clone(), request));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        self.runtime = Some(runtime);
    }

    /// From now on, writes of objects whose name has `part` in it go wrong.
    pub fn fail(&self, part: &str, fault: Fault) {
        *lock(&self.faults) = Faults { fault: Some((part.to_owned(), fault)), hits: 0 };
    }

    /// From now on nothing goes wrong; what is held stays held.
    pub fn recover(&self) {
        lock(&self.faults).fault = None;
    }

    /// Waits until so many writes went wrong.
    pub fn wait_for_hits(&self, hits: usize) {
        consort_tests::process::wait_for("writes that go wrong", || {
            (lock(&self.faults).hits >= hits).then_some(())
        });
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where an object is on this machine.
    pub fn path(&self, object: &str) -> PathBuf {
        self.directory.path().join(BUCKET).join(object)
    }

    /// The names of the objects below a name, sorted.
    pub fn objects(&self, below: &str) -> Vec<String> {
        let mut objects = Vec::new();
        collect(&self.path(below), below, &mut objects);
        objects.sort();
        objects
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        // A runtime must not be waited for from within another.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn collect(folder: &Path, name: &str, objects: &mut Vec<String>) {
    // A folder may not be there yet, or no longer.
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.expect("the bucket can be read").path();
        let file = path.file_name().expect("an entry has a name").to_string_lossy();
        let name = format!("{name}/{file}");
        if path.is_dir() {
            collect(&path, &name, objects);
        } else {
            objects.push(name);
        }
    }
}

async fn answer(
    service: S3Service,
    faults: Arc<Mutex<Faults>>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let fault = {
        let mut faults = lock(&faults);
        let concerned = |part: &str| request.method() == Method::PUT && request.uri().path().contains(part);
        let fault = faults.fault.as_ref().filter(|(part, _)| concerned(part)).map(|(_, fault)| *fault);
        faults.hits += usize::from(fault.is_some());
        fault
    };
    // The crate would make any bucket that is written to.
    if request.uri().path().trim_start_matches('/').split('/').next() != Some(BUCKET) {
        return Ok(refusal(StatusCode::NOT_FOUND, "NoSuchBucket"));
    }
    match fault {
        Some(Fault::Held) => std::future::pending().await,
        Some(Fault::Full) => Ok(refusal(StatusCode::FORBIDDEN, "QuotaExceeded")),
        None => {
            let answered = hyper::service::Service::call(&service, request).await;
            Ok(answered.unwrap_or_else(|error| panic!("the server failed: {error:?}")))
        }
    }
}

fn refusal(status: StatusCode, code: &str) -> Response<Body> {
    let mut response = Response::new(Body::from(format!("<Error><Code>{code}</Code></Error>")));
    *response.status_mut() = status;
    response
}

fn lock(faults: &Mutex<Faults>) -> MutexGuard<'_, Faults> {
    faults.lock().unwrap_or_else(PoisonError::into_inner)
}
