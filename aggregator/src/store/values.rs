//! Between the types of the code and those of the database's columns, both ways checked.

use std::{fmt::Display, str::FromStr};

use sqlx::{Row, any::AnyRow};

use super::StoreError;

/// Whether a connection keeps a statement with an `Option<f64>` prepared. sqlx 0.8.6 tells PostgreSQL that a NULL among
/// them is a `real`: a statement that was prepared for it would refuse the next number.
pub(super) const KEEPS_FLOATS_THAT_MAY_BE_NULL: bool = false;

/// A count for a BIGINT column.
pub(super) fn count(column: &'static str, value: u64) -> Result<i64, StoreError> {
    i64::try_from(value).map_err(|_| StoreError::Unstorable { column, value: value.to_string() })
}

/// A float for a DOUBLE PRECISION column: SQLite would turn NaN into NULL.
pub(super) fn finite(column: &'static str, value: f64) -> Result<f64, StoreError> {
    if value.is_finite() {
        Ok(value)
    } else {
        Err(StoreError::Unstorable { column, value: value.to_string() })
    }
}

/// A text that somebody else wrote, for a TEXT column: PostgreSQL holds no NUL.
pub(super) fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// Rows in the order of their keys.
pub(super) fn sorted<T, K: Ord>(
    rows: impl Iterator<Item = Result<T, StoreError>>,
    key: impl FnMut(&T) -> K,
) -> Result<Vec<T>, StoreError> {
    let mut rows: Vec<T> = rows.collect::<Result<_, _>>()?;
    rows.sort_by_cached_key(key);
    Ok(rows)
}

/// A row, read column by column.
pub(super) struct Columns<'a>(pub &'a AnyRow);

impl Columns<'_> {
    /// A name or a digest.
    pub(super) fn parsed<T: FromStr>(&self, column: &'static str) -> Result<T, StoreError> {
        let text = self.text(column)?;
        text.parse().map_err(|_| unreadable(column, &text))
    }

    /// A text that `read` knows.
    pub(super) fn known<T>(
        &self,
        column: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, StoreError> {
        let text = self.text(column)?;
        read(&text).ok_or_else(|| unreadable(column, &text))
    }

    pub(super) fn text(&self, column: &'static str) -> Result<String, StoreError> {
        self.0.try_get(column).map_err(StoreError::of("read a row"))
    }

    pub(super) fn optional_text(&self, column: &'static str) -> Result<Option<String>, StoreError> {
        self.0.try_get(column).map_err(StoreError::of("read a row"))
    }

    /// A count, as u32 or u64.
    pub(super) fn count<T: TryFrom<i64>>(&self, column: &'static str) -> Result<T, StoreError> {
        let value: i64 = self.0.try_get(column).map_err(StoreError::of("read a row"))?;
        T::try_from(value).map_err(|_| unreadable(column, &value))
    }

    pub(super) fn optional_count<T: TryFrom<i64>>(
        &self,
        column: &'static str,
    ) -> Result<Option<T>, StoreError> {
        let value: Option<i64> = self.0.try_get(column).map_err(StoreError::of("read a row"))?;
        value.map(|value| T::try_from(value).map_err(|_| unreadable(column, &value))).transpose()
    }

    pub(super) fn float(&self, column: &'static str) -> Result<f64, StoreError> {
        self.0.try_get(column).map_err(StoreError::of("read a row"))
    }

    pub(super) fn optional_float(&self, column: &'static str) -> Result<Option<f64>, StoreError> {
        self.0.try_get(column).map_err(StoreError::of("read a row"))
    }
}

fn unreadable(column: &'static str, value: &impl Display) -> StoreError {
    StoreError::Unreadable { column, value: value.to_string() }
}
