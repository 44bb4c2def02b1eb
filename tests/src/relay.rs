//! What the proxies of the tests have in common: a port, a thread, and a task for each pair of connections.

use std::{io, thread::JoinHandle};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinSet,
};

/// Accepts connections on a port of the system's choice, makes one to the target for each, and gives both to
/// be handed on. All of it is done by one thread, which ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Relay {
    endpoint: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Starts it before `target` (`HOST:PORT`). A pair is given up when `hand_on` returns.
    pub(crate) fn start<F>(
        target: &str,
        hand_on: impl Fn(TcpStream, TcpStream) -> F + Clone + Send + 'static,
    ) -> Self
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port can be had");
        listener.set_nonblocking(true).expect("a socket can be asynchronous");
        let port = listener.local_addr().expect("a listener has an address").port();
        let (stop, stopped) = oneshot::channel();
        let target = target.to_owned();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime can be built").block_on(async {
                let listener = TcpListener::from_std(listener).expect("the socket is asynchronous");
                tokio::select! {
                    () = serve(&listener, &target, hand_on) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { endpoint: format!("localhost:{port}"), stop: Some(stop), thread: Some(thread) }
    }

    /// Where to connect: `localhost:PORT`.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It panics only with the test.
            let _ = thread.join();
        }
    }
}

async fn serve<F>(
    listener: &TcpListener,
    target: &str,
    hand_on: impl Fn(TcpStream, TcpStream) -> F + Clone + Send + 'static,
) where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (near, _) = accepted.expect("connections can be accepted");
                let (target, hand_on) = (target.to_owned(), hand_on.clone());
                // A connection that fails is an end like any other.
                connections.spawn(async move { drop(connect(near, &target, hand_on).await) });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connect<F: Future<Output = io::Result<()>>>(
    near: TcpStream,
    target: &str,
    hand_on: impl Fn(TcpStream, TcpStream) -> F,
) -> io::Result<()> {
    let far = TcpStream::connect(target).await?;
    for stream in [&near, &far] {
        stream.set_nodelay(true)?;
    }
    hand_on(near, far).await
}
