//! A socket in front of PostgreSQL's that breaks a connection at its commit: the moment at which nobody but the server
//! can know what became of it.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use consort_tests::postgres::SOCKET;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

/// Where a connection breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The server never sees the commit.
    BeforeCommit,
    /// The server commits, and its answer is lost.
    AfterCommit,
    /// The server never sees the commit, and nobody hears of that.
    Silent,
}

/// Forwards connections to a server.
pub struct LossySocket {
    folder: TempDir,
    plan: Arc<Mutex<Option<Cut>>>,
    cuts: Arc<AtomicUsize>,
}

impl LossySocket {
    /// Listens in a folder of its own for the server whose socket is in `server`.
    pub async fn in_front_of(server: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a temporary directory can be made");
        let listener = UnixListener::bind(folder.path().join(SOCKET)).expect("a socket can be made");
        let (plan, cuts) = (Arc::new(Mutex::new(None)), Arc::new(AtomicUsize::new(0)));
        let (server, planned, counted) = (server.join(SOCKET), plan.clone(), cuts.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, server.clone(), planned.clone(), counted.clone()));
            }
        });
        Self { folder, plan, cuts }
    }

    /// Where its socket is.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Breaks the connection of the next commit.
    pub fn cut(&self, cut: Cut) {
        *self.plan.lock().expect("no holder panics") = Some(cut);
    }

    /// How many it broke.
    pub fn cuts(&self) -> usize {
        self.cuts.load(Ordering::SeqCst)
    }
}

async fn forward(
    mut client: UnixStream,
    server: PathBuf,
    plan: Arc<Mutex<Option<Cut>>>,
    cuts: Arc<AtomicUsize>,
) {
    let mut server = UnixStream::connect(server).await.expect("the server listens");
    let (mut asked, mut answered) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        tokio::select! {
            read = client.read(&mut asked) => {
                let Ok(length @ 1..) = read else { return };
                let asked = &asked[..length];
                let commits = asked.windows(6).any(|word| word == b"COMMIT");
                let cut = if commits { plan.lock().expect("no holder panics").take() } else { None };
                if cut.is_some() {
                    cuts.fetch_add(1, Ordering::SeqCst);
                }
                match cut {
                    Some(Cut::BeforeCommit) => return,
                    Some(Cut::Silent) => {
                        // Until the client gives up.
                        while client.read(&mut answered).await.is_ok_and(|length| length > 0) {}
                        return;
                    }
                    Some(Cut::AfterCommit) | None => {}
                }
                if server.write_all(asked).await.is_err() {
                    return;
                }
                if cut.is_some() {
                    // The answer says that it is done; it goes no further.
                    let _ = server.read(&mut answered).await;
                    return;
                }
            }
            read = server.read(&mut answered) => {
                let Ok(length @ 1..) = read else { return };
                if client.write_all(&answered[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}
