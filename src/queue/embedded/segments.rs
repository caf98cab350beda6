//! The segments of all subscribers, as they are between two changes.

use rusqlite::Connection;

use super::parse_patterns;
use crate::event::{Pattern, matcher::Matcher};

/// What the subscribers are to get of the log.
#[derive(Debug, Default)]
pub(super) struct Segments {
    /// The number of this state; `None` of what was not read.
    version: Option<i64>,
    /// The patterns of the open segments.
    open: Matcher,
}

impl Segments {
    /// Reads the segments if they are not these any more.
    pub(super) fn changed(&self, db: &Connection) -> rusqlite::Result<Option<Self>> {
        let version = db
            .prepare_cached("SELECT segments FROM log_state")?
            .query_row([], |r| r.get::<_, i64>(0))?;
        if self.version == Some(version) {
            return Ok(None);
        }
        let mut query = db.prepare_cached("SELECT patterns FROM segment WHERE upto IS NULL")?;
        let mut rows = query.query([])?;
        let mut patterns: Vec<(u32, Pattern)> = Vec::new();
        while let Some(row) = rows.next()? {
            patterns.extend(parse_patterns(row.get_ref(0)?.as_str()?).into_iter().map(|p| (0, p)));
        }
        let open = Matcher::new(patterns.iter().map(|(owner, pattern)| (*owner, pattern)));
        Ok(Some(Self { version: Some(version), open }))
    }

    /// Whether a subscriber gets an event that is stored now.
    pub(super) fn match_now(&self, event_type: &str) -> bool {
        self.open.matches(event_type)
    }
}
