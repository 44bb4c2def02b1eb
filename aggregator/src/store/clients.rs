//! Sites that joined, and what they have prepared for a run.

use consort_common::{
    ids::{RunName, SiteName},
    units::UnixMs,
};
use sqlx::any::AnyRow;

use super::{
    Store, StoreError,
    values::{Columns, count, sorted, storable},
};

/// A site that joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientRow {
    /// Its name.
    pub site: SiteName,
    /// When it joined first.
    pub first_seen_ms: UnixMs,
    /// When it was last heard of.
    pub last_seen_ms: UnixMs,
    /// Its device, in words.
    pub device: String,
    /// Its software's version.
    pub software_version: String,
}

/// What a site has prepared for a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunSiteRow {
    /// The site.
    pub site: SiteName,
    /// Tokens to train on.
    pub train_tokens: u64,
    /// Tokens held out.
    pub held_out_tokens: u64,
    /// Documents.
    pub documents: u64,
}

impl Store {
    /// Records that a site was heard of: it is new, or everything but `first_seen_ms` is updated.
    pub async fn upsert_client(&self, client: &ClientRow) -> Result<(), StoreError> {
        const ATTEMPT: &str = "record a client";
        let mut transaction = self.connections.begin(ATTEMPT).await?;
        sqlx::query(
            "INSERT INTO clients (site, first_seen_ms, last_seen_ms, device, software_version) \
             VALUES ($1, $2, $3, $4, $5) ON CONFLICT (site) DO UPDATE SET last_seen_ms = excluded.last_seen_ms, \
             device = excluded.device, software_version = excluded.software_version",
        )
        .bind(client.site.as_str())
        .bind(count("clients.first_seen_ms", client.first_seen_ms)?)
        .bind(count("clients.last_seen_ms", client.last_seen_ms)?)
        .bind(storable(&client.device))
        .bind(storable(&client.software_version))
        .execute(&mut *transaction)
        .await
        .map_err(StoreError::of(ATTEMPT))?;
        transaction.commit(ATTEMPT).await
    }

    /// Every site that ever joined, by name.
    pub async fn clients(&self) -> Result<Vec<ClientRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM clients")
            .fetch_all(&*self.connections.reader())
            .await
            .map_err(StoreError::of("list the clients"))?;
        sorted(rows.iter().map(client_row), |client| client.site.clone())
    }

    /// One site.
    pub async fn client(&self, site: &SiteName) -> Result<Option<ClientRow>, StoreError> {
        let row = sqlx::query("SELECT * FROM clients WHERE site = $1")
            .bind(site.as_str())
            .fetch_optional(&*self.connections.reader())
            .await
            .map_err(StoreError::of("read a client"))?;
        row.as_ref().map(client_row).transpose()
    }

    /// Records what a site has prepared for a run, in place of its last report.
    pub async fn upsert_run_site(&self, run: &RunName, row: &RunSiteRow) -> Result<(), StoreError> {
        const ATTEMPT: &str = "record what a site has prepared";
        let mut transaction = self.connections.begin(ATTEMPT).await?;
        sqlx::query(
            "INSERT INTO run_sites (run, site, train_tokens, held_out_tokens, documents) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (run, site) DO UPDATE SET train_tokens = excluded.train_tokens, \
             held_out_tokens = excluded.held_out_tokens, documents = excluded.documents",
        )
        .bind(run.as_str())
        .bind(row.site.as_str())
        .bind(count("run_sites.train_tokens", row.train_tokens)?)
        .bind(count("run_sites.held_out_tokens", row.held_out_tokens)?)
        .bind(count("run_sites.documents", row.documents)?)
        .execute(&mut *transaction)
        .await
        .map_err(StoreError::of(ATTEMPT))?;
        transaction.commit(ATTEMPT).await
    }

    /// What sites have prepared for a run, by site.
    pub async fn run_sites(&self, run: &RunName) -> Result<Vec<RunSiteRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM run_sites WHERE run = $1")
            .bind(run.as_str())
            .fetch_all(&*self.connections.reader())
            .await
            .map_err(StoreError::of("list a run's sites"))?;
        sorted(rows.iter().map(run_site_row), |row| row.site.clone())
    }
}

fn client_row(row: &AnyRow) -> Result<ClientRow, StoreError> {
    let row = Columns(row);
    Ok(ClientRow {
        site: row.parsed("site")?,
        first_seen_ms: row.count("first_seen_ms")?,
        last_seen_ms: row.count("last_seen_ms")?,
        device: row.text("device")?,
        software_version: row.text("software_version")?,
    })
}

fn run_site_row(row: &AnyRow) -> Result<RunSiteRow, StoreError> {
    let row = Columns(row);
    Ok(RunSiteRow {
        site: row.parsed("site")?,
        train_tokens: row.count("train_tokens")?,
        held_out_tokens: row.count("held_out_tokens")?,
        documents: row.count("documents")?,
    })
}
