//! Runs: what they are, how far they are.

use consort_common::{
    ids::{Digest, RunName},
    units::UnixMs,
};
use sqlx::any::AnyRow;

use super::{
    Store, StoreError,
    error::is_taken,
    values::{Columns, count, sorted, storable},
};

/// The model that a run starts from, where that is not the seed's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartOrigin {
    /// What people call it.
    pub name: String,
    /// Digest of its flat vector as it came: version 0's, unless that is rounded to what is sent.
    pub digest: Digest,
}

/// A run to be created, at version 0.
#[derive(Debug, Clone, PartialEq)]
pub struct NewRun {
    /// Its name.
    pub name: RunName,
    /// The specification as given.
    pub spec_toml: String,
    /// Its digest.
    pub spec_digest: Digest,
    /// Digest of the model's tensor manifest.
    pub manifest_digest: Digest,
    /// Digest of its tokenizer.json.
    pub tokenizer_digest: Digest,
    /// "llama", "gpt2", "mpt".
    pub architecture: String,
    /// Length of the flat vector.
    pub parameters: u64,
    /// The round engine's state.
    pub state_json: String,
    /// Digest of version 0.
    pub version_digest: Digest,
    /// What version 0 was made of.
    pub start: Option<StartOrigin>,
    /// Now.
    pub created_ms: UnixMs,
}

/// A run.
#[derive(Debug, Clone, PartialEq)]
pub struct RunRow {
    /// Its name.
    pub name: RunName,
    /// The specification as given.
    pub spec_toml: String,
    /// Its digest.
    pub spec_digest: Digest,
    /// Digest of the model's tensor manifest.
    pub manifest_digest: Digest,
    /// Digest of its tokenizer.json.
    pub tokenizer_digest: Digest,
    /// "llama", "gpt2", "mpt".
    pub architecture: String,
    /// Length of the flat vector.
    pub parameters: u64,
    /// The round engine's state.
    pub state_json: String,
    /// The newest committed version.
    pub version: u32,
    /// Its digest.
    pub version_digest: Digest,
    /// What version 0 was made of.
    pub start: Option<StartOrigin>,
    /// When it was created.
    pub created_ms: UnixMs,
    /// When it was started first.
    pub started_ms: Option<UnixMs>,
    /// When it finished or was aborted.
    pub finished_ms: Option<UnixMs>,
    /// Model payload sent to sites.
    pub bytes_down: u64,
    /// Model payload received from sites.
    pub bytes_up: u64,
    /// Tokens trained in committed rounds, all sites.
    pub tokens: u64,
}

const SELECT: &str = "SELECT runs.*, \
    (SELECT CAST(COALESCE(SUM(rounds.tokens), 0) AS BIGINT) FROM rounds WHERE rounds.run = runs.name) AS tokens \
    FROM runs";

impl Store {
    /// Records a run. Its version 0 and its tokenizer are on disk already.
    ///
    /// # Errors
    /// [`StoreError::RunExists`], or the database's.
    pub async fn create_run(&self, run: &NewRun) -> Result<(), StoreError> {
        const ATTEMPT: &str = "record a new run";
        let mut transaction = self.connections.begin(ATTEMPT).await?;
        let inserted = sqlx::query(
            "INSERT INTO runs (name, spec_toml, spec_digest, manifest_digest, tokenizer_digest, architecture, \
             parameters, state_json, version, version_digest, created_ms, start_origin, start_digest) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, 0, $9, $10, $11, $12)",
        )
        .bind(run.name.as_str())
        .bind(&run.spec_toml)
        .bind(run.spec_digest.to_string())
        .bind(run.manifest_digest.to_string())
        .bind(run.tokenizer_digest.to_string())
        .bind(&run.architecture)
        .bind(count("runs.parameters", run.parameters)?)
        .bind(&run.state_json)
        .bind(run.version_digest.to_string())
        .bind(count("runs.created_ms", run.created_ms)?)
        .bind(run.start.as_ref().map(|start| storable(&start.name)))
        .bind(run.start.as_ref().map(|start| start.digest.to_string()))
        .execute(&mut *transaction)
        .await;
        match inserted {
            Err(error) if is_taken(&error) => Err(StoreError::RunExists(run.name.clone())),
            Err(error) => Err(StoreError::of(ATTEMPT)(error)),
            Ok(_) => transaction.commit(ATTEMPT).await,
        }
    }

    /// All runs, oldest first.
    pub async fn runs(&self) -> Result<Vec<RunRow>, StoreError> {
        let rows = sqlx::query(SELECT)
            .fetch_all(&*self.connections.reader())
            .await
            .map_err(StoreError::of("list the runs"))?;
        sorted(rows.iter().map(run_row), |row| (row.created_ms, row.name.clone()))
    }

    /// One run.
    pub async fn run(&self, name: &RunName) -> Result<Option<RunRow>, StoreError> {
        let row = sqlx::query(&format!("{SELECT} WHERE runs.name = $1"))
            .bind(name.as_str())
            .fetch_optional(&*self.connections.reader())
            .await
            .map_err(StoreError::of("read a run"))?;
        row.as_ref().map(run_row).transpose()
    }

    /// Adds to a run's model payload sent to (`down`) and received from (`up`) sites, in bytes.
    ///
    /// # Errors
    /// [`StoreError::NoSuchRun`], or the database's.
    pub async fn add_traffic(&self, run: &RunName, down: u64, up: u64) -> Result<(), StoreError> {
        const ATTEMPT: &str = "count a run's traffic";
        let mut transaction = self.connections.begin(ATTEMPT).await?;
        let updated = sqlx::query(
            "UPDATE runs SET bytes_down = bytes_down + $2, bytes_up = bytes_up + $3 WHERE name = $1",
        )
        .bind(run.as_str())
        .bind(count("runs.bytes_down", down)?)
        .bind(count("runs.bytes_up", up)?)
        .execute(&mut *transaction)
        .await
        .map_err(StoreError::of(ATTEMPT))?;
        if updated.rows_affected() == 0 {
            return Err(StoreError::NoSuchRun(run.clone()));
        }
        transaction.commit(ATTEMPT).await
    }
}

fn run_row(row: &AnyRow) -> Result<RunRow, StoreError> {
    let row = Columns(row);
    Ok(RunRow {
        name: row.parsed("name")?,
        spec_toml: row.text("spec_toml")?,
        spec_digest: row.parsed("spec_digest")?,
        manifest_digest: row.parsed("manifest_digest")?,
        tokenizer_digest: row.parsed("tokenizer_digest")?,
        architecture: row.text("architecture")?,
        parameters: row.count("parameters")?,
        state_json: row.text("state_json")?,
        version: row.count("version")?,
        version_digest: row.parsed("version_digest")?,
        start: start_origin(&row)?,
        created_ms: row.count("created_ms")?,
        started_ms: row.optional_count("started_ms")?,
        finished_ms: row.optional_count("finished_ms")?,
        bytes_down: row.count("bytes_down")?,
        bytes_up: row.count("bytes_up")?,
        tokens: row.count("tokens")?,
    })
}

fn start_origin(row: &Columns<'_>) -> Result<Option<StartOrigin>, StoreError> {
    let Some(name) = row.optional_text("start_origin")? else { return Ok(None) };
    Ok(Some(StartOrigin { name, digest: row.parsed("start_digest")? }))
}
