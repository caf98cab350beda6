//! Lists of events: chunk by chunk from the latest one, as far as the time allows.

use std::{ops::ControlFlow, time::Instant};

use rusqlite::Connection;

use super::{
    chunk::{Chunk, MAX_TYPES, Types},
    fault::{Fault, millis, time},
    hours::HOUR,
    source::{Found, Source},
    tokens::{self, MAX_TERMS},
};
use crate::{
    clock,
    event::Pattern,
    store::{
        By, EventCounts, EventFilter, EventNumber, EventRow, MAX_ROWS, Page, TypeCounts, words,
    },
};

/// What is asked for.
#[derive(Debug, Clone)]
pub(super) struct Search {
    pub(super) filter: EventFilter,
    pub(super) before: Option<EventNumber>,
    pub(super) limit: usize,
    pub(super) deadline: Instant,
    /// The oldest time that is shown, in Unix milliseconds.
    pub(super) horizon: i64,
}

/// Takes the time, in Unix milliseconds, and the type of each event that is found.
type Counter<'s> = &'s mut dyn FnMut(i64, &str);

/// A search on its way.
struct Hunt<'s> {
    search: &'s Search,
    /// What is found is counted, and not kept.
    counter: Option<Counter<'s>>,
    /// Unix milliseconds: from, and before.
    times: (i64, i64),
    found: Vec<EventRow>,
    /// Everything from this number on was read, and the time of that event.
    reached: (i64, i64),
    is_late: bool,
}

/// Counts the events that a filter selects in some hours, the first one given in Unix milliseconds.
pub(super) fn count(
    db: &Connection,
    source: &mut Source<'_>,
    search: &Search,
    since: i64,
    hours: usize,
) -> Result<EventCounts, Fault> {
    let mut counts = EventCounts { hours: vec![0; hours], uncounted: None };
    let mut counter = |at: i64, _: &str| {
        let hour = usize::try_from(at.saturating_sub(since) / HOUR).ok();
        if let Some(count) = hour.and_then(|hour| counts.hours.get_mut(hour)) {
            *count += 1;
        }
    };
    let page = hunt(db, source, search, Some(&mut counter))?;
    counts.uncounted = page.searched_back_to.map(|at| (time(since), at));
    Ok(counts)
}

/// Counts the events of a time by their types.
pub(super) fn count_types(
    db: &Connection,
    source: &mut Source<'_>,
    search: &Search,
) -> Result<TypeCounts, Fault> {
    let mut counts = TypeCounts::default();
    let page = hunt(db, source, search, Some(&mut |_, event_type| counts.add(event_type)))?;
    // A chunk has older events too, and producers choose their times: one that is older than what is
    // counted does not show that all were.
    let since = search.filter.since;
    counts.counted_back_to =
        page.searched_back_to.map(|at| since.map_or(at, |since| at.max(since)));
    Ok(counts)
}

/// Lists the events that a filter selects.
pub(super) fn events(
    db: &Connection,
    source: &mut Source<'_>,
    search: &Search,
) -> Result<Page<EventRow>, Fault> {
    hunt(db, source, search, None)
}

fn hunt<'s>(
    db: &Connection,
    source: &mut Source<'_>,
    search: &'s Search,
    counter: Option<Counter<'s>>,
) -> Result<Page<EventRow>, Fault> {
    let filter = &search.filter;
    let ends = Page { rows: Vec::new(), next: None, searched_back_to: None };
    if search.limit == 0 || filter.text.as_ref().is_some_and(|text| !words::is_searchable(text)) {
        return Ok(ends);
    }
    let by_at = |at: Option<std::time::SystemTime>| at.filter(|_| filter.by == By::At).map(millis);
    let since = by_at(filter.since).map_or(search.horizon, |since| since.max(search.horizon));
    // A time between two milliseconds: the filter itself is exact.
    let until = by_at(filter.until).map_or(i64::MAX, |until| until.saturating_add(1));
    let mut hunt = Hunt {
        search,
        counter,
        times: (since, until),
        found: Vec::new(),
        reached: (i64::MAX, i64::MAX),
        is_late: false,
    };
    let mut chunks = Chunk::list(db)?;
    let before = search.before.map_or(i64::MAX, |n| n.0);
    chunks.retain(|chunk| chunk.first < before && chunk.max_at >= since && chunk.min_at < until);
    for (n, chunk) in chunks.iter().enumerate() {
        let ended = hunt.chunk(db, source, chunk, before)?.is_break();
        let is_last = n + 1 == chunks.len();
        if ended {
            return Ok(hunt.into_page());
        }
        hunt.reached = (chunk.first, chunk.begun);
        if !is_last && clock::instant() >= search.deadline {
            hunt.is_late = true;
            return Ok(hunt.into_page());
        }
    }
    Ok(Page { rows: hunt.found, ..ends })
}

impl Hunt<'_> {
    fn chunk(
        &mut self,
        db: &Connection,
        source: &mut Source<'_>,
        chunk: &Chunk,
        before: i64,
    ) -> Result<ControlFlow<()>, Fault> {
        let filter = &self.search.filter;
        let types = Types::of(db, chunk);
        let choice = match &filter.event_type {
            Some(pattern) => Choice::of(pattern, types.names()?, chunk),
            None => Choice::Any,
        };
        let chosen = match &choice {
            Choice::None => return Ok(ControlFlow::Continue(())),
            Choice::Any => None,
            Choice::These(names) => Some(&names[..]),
        };
        let query = (chosen.is_some() || tokens::is_indexed(filter))
            .then(|| tokens::query(filter, chosen))
            .flatten();
        let mut each = |found: Found<'_>| self.examine(&found);
        match query {
            Some(query) => source.find(db, (chunk, &types), &query, before, &mut each),
            None => source.scan(db, (chunk, &types), before, &mut each),
        }
    }

    fn examine(&mut self, found: &Found<'_>) -> rusqlite::Result<ControlFlow<()>> {
        let (number, at) = (found.number()?, found.at()?);
        let filter = &self.search.filter;
        let may_be = at >= self.times.0
            && at < self.times.1
            && match &filter.event_type {
                Some(pattern) => pattern.matches(found.event_type()?),
                None => true,
            };
        if may_be {
            match &mut self.counter {
                Some(count) if filter.is_of_type_and_time() && filter.is_within(time(at)) => {
                    count(at, found.event_type()?);
                }
                Some(count) => {
                    if filter.selects(&found.to_row()?) {
                        count(at, found.event_type()?);
                    }
                }
                None => {
                    let row = found.to_row()?;
                    if filter.selects(&row) {
                        self.found.push(row);
                    }
                    if self.found.len() > self.search.limit {
                        return Ok(ControlFlow::Break(()));
                    }
                }
            }
        }
        self.reached = (number, at);
        if clock::instant() >= self.search.deadline {
            self.is_late = true;
            return Ok(ControlFlow::Break(()));
        }
        Ok(ControlFlow::Continue(()))
    }

    /// A page that the list goes on after.
    fn into_page(mut self) -> Page<EventRow> {
        if self.found.len() > self.search.limit {
            self.found.truncate(self.search.limit);
            let next = self.found.last().map(|row| row.number.0);
            return Page { rows: self.found, next, searched_back_to: None };
        }
        let (number, at) = self.reached;
        let searched_back_to = self.is_late.then(|| time(at));
        Page { rows: self.found, next: Some(number), searched_back_to }
    }
}

/// The types of a chunk that a pattern matches.
enum Choice<'t> {
    None,
    /// All of them, or so many that the index is not asked.
    Any,
    These(Vec<&'t str>),
}

impl<'t> Choice<'t> {
    fn of(pattern: &'t Pattern, types: &'t [String], chunk: &Chunk) -> Self {
        let names = types.iter().map(String::as_str);
        let matching: Vec<&str> = names.filter(|name| pattern.matches(name)).collect();
        let are_all_listed = chunk.types < MAX_TYPES;
        match matching.len() {
            0 if are_all_listed => Self::None,
            n if are_all_listed && (n == types.len() || n > MAX_TERMS) => Self::Any,
            _ if are_all_listed => Self::These(matching),
            // The list lacks some.
            _ if pattern.as_str().contains(['*', '#']) => Self::Any,
            _ => Self::These(vec![pattern.as_str()]),
        }
    }
}

/// The chunk that a number is in.
fn chunk_of(db: &Connection, number: i64) -> rusqlite::Result<Option<Chunk>> {
    let holds = |chunk: &Chunk| (chunk.first..=chunk.last).contains(&number);
    Ok(Chunk::list(db)?.into_iter().find(holds))
}

/// The event with a number, unless it is older than what is shown.
pub(super) fn event(
    db: &Connection,
    source: &mut Source<'_>,
    number: EventNumber,
    horizon: i64,
) -> Result<Option<EventRow>, Fault> {
    let Some(chunk) = chunk_of(db, number.0)? else { return Ok(None) };
    let row = source.event(db, &chunk, number.0)?;
    Ok(row.filter(|row| millis(row.at) >= horizon))
}

/// Events in their order, after one number and up to another.
pub(super) fn rows(
    db: &Connection,
    source: &mut Source<'_>,
    (after, upto): (EventNumber, EventNumber),
    limit: usize,
    bytes: usize,
) -> Result<Vec<EventRow>, Fault> {
    let limit = limit.min(MAX_ROWS);
    let (first, last) = (after.0.saturating_add(1), upto.0);
    let (mut rows, mut size) = (Vec::new(), 0);
    let mut chunks = Chunk::list(db)?;
    chunks.retain(|chunk| chunk.last >= first && chunk.first <= last);
    for chunk in chunks.iter().rev() {
        let mut each = |found: Found<'_>| {
            let row = found.to_row()?;
            size += row.body.as_ref().map_or(0, bytes::Bytes::len);
            if rows.len() >= limit || (size > bytes && !rows.is_empty()) {
                return Ok(ControlFlow::Break(()));
            }
            rows.push(row);
            Ok(ControlFlow::Continue(()))
        };
        let range = (first.max(chunk.first), last.min(chunk.last));
        if source.range(db, chunk, range, &mut each)?.is_break() {
            break;
        }
    }
    Ok(rows)
}
