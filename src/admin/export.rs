//! Events as a file: all that a filter selects, newest first, as CSV or JSON Lines.
//!
//! A file is written while it is read from history, a page at a time. It ends with its last event, or
//! its connection is broken off: a client never takes a part for the whole.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    middleware,
    response::{IntoResponse as _, Response},
    routing::get,
};
use futures_util::{StreamExt as _, stream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    answer::Refusal,
    guard::with_token,
    history::{away, event_filter},
    query::{FromQuery, Parameters, Query},
    view::{Event, EventWithBytes, Time},
};
use crate::{
    clock, csv,
    store::{EventFilter, EventNumber, EventRow, Page, Reach, Store},
};

/// Files that are written at the same time. Each has no more than a page in memory.
const AT_ONCE: usize = 2;

/// Rows of a page, and the time of its search: pages of the console come in between.
const ROWS: usize = 200;
const SEARCH_TIME: Duration = Duration::from_millis(100);

/// The longest time of a file, after which its connection is broken off.
const WITHIN: Duration = Duration::from_secs(3600);

/// How far back history reaches, and how many gaps of events it has.
const FROM: HeaderName = HeaderName::from_static("hooktrail-history-from");
const GAPS: HeaderName = HeaderName::from_static("hooktrail-history-gaps");

/// The format of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Csv,
    JsonLines,
}

impl Format {
    fn media_type(self) -> &'static str {
        match self {
            Self::Csv => "text/csv; charset=utf-8; header=present",
            Self::JsonLines => "application/jsonl",
        }
    }

    /// The name of a parameter's value, and the ending of the file's name.
    fn name(self) -> &'static str {
        match self {
            Self::Csv => "csv",
            Self::JsonLines => "jsonl",
        }
    }

    fn head(self) -> String {
        match self {
            Self::Csv => csv::line(Event::COLUMNS),
            Self::JsonLines => String::new(),
        }
    }

    fn push(self, row: &EventRow, into: &mut String) -> io::Result<()> {
        match self {
            Self::Csv => into.push_str(&Event::new(row).to_csv()),
            Self::JsonLines => {
                into.push_str(&serde_json::to_string(&EventWithBytes::new(row))?);
                into.push('\n');
            }
        }
        Ok(())
    }
}

/// The query of a file.
pub(super) struct Wanted {
    filter: EventFilter,
    format: Format,
}

impl FromQuery for Wanted {
    fn from_query(given: &mut Parameters) -> Self {
        let format = given.required("format", |text| match text {
            "csv" => Ok(Format::Csv),
            "jsonl" => Ok(Format::JsonLines),
            _ => Err("must be `csv` or `jsonl`"),
        });
        Self { filter: event_filter(given), format: format.unwrap_or(Format::Csv) }
    }
}

/// Writes the files.
pub(super) struct Exporter<S> {
    store: S,
    room: Arc<Semaphore>,
}

/// The route. It needs a token.
pub(super) fn routes<S: Store>(exporter: Arc<Exporter<S>>) -> Router {
    let answer = async |extract::State(exporter): extract::State<Arc<Exporter<S>>>,
                        Query(wanted): Query<Wanted>| {
        exporter.file(wanted).await.unwrap_or_else(Refusal::into_response)
    };
    Router::new()
        .route("/v1/events/export", get(answer))
        .route_layer(middleware::from_fn(with_token))
        .with_state(exporter)
}

/// A file on its way.
struct Writing<S> {
    store: S,
    wanted: Wanted,
    /// The rows to write, and from where it goes on.
    page: Page<EventRow>,
    begun: Instant,
    is_over: bool,
    _place: OwnedSemaphorePermit,
}

impl<S: Store> Exporter<S> {
    pub(super) fn new(store: S) -> Self {
        Self { store, room: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// The answer that is the file. A store that is away is found out before it begins.
    pub(super) async fn file(&self, wanted: Wanted) -> Result<Response, Refusal> {
        let Ok(place) = self.room.clone().try_acquire_owned() else { return Err(Refusal::busy()) };
        let store = self.store.clone();
        let page = page(&store, &wanted.filter, None).await.map_err(away)?;
        let reach = store.reach().await.map_err(away)?;
        let format = wanted.format;
        let writing =
            Writing { store, wanted, page, begun: clock::instant(), is_over: false, _place: place };
        let head = stream::iter([Ok(Bytes::from(format.head()))]);
        let rows = stream::try_unfold(writing, Writing::next);
        Ok((StatusCode::OK, headers(format, &reach), Body::from_stream(head.chain(rows)))
            .into_response())
    }
}

async fn page<S: Store>(
    store: &S,
    filter: &EventFilter,
    before: Option<EventNumber>,
) -> Result<Page<EventRow>, crate::store::StoreError> {
    store.events(filter, before, ROWS, SEARCH_TIME).await
}

impl<S: Store> Writing<S> {
    /// The next lines; `None` at the end of the file.
    async fn next(mut self) -> io::Result<Option<(Bytes, Self)>> {
        if self.is_over {
            return Ok(None);
        }
        let mut lines = String::new();
        for row in &self.page.rows {
            self.wanted.format.push(row, &mut lines)?;
        }
        match self.page.next {
            None => self.is_over = true,
            Some(_) if clock::instant().saturating_duration_since(self.begun) >= WITHIN => {
                tracing::warn!(
                    hours = WITHIN.as_secs() / 3600,
                    remedy = "export less at once: give `since` and `until`",
                    "an export of events took too long, and was broken off"
                );
                return Err(io::Error::from(io::ErrorKind::TimedOut));
            }
            Some(next) => {
                let read = page(&self.store, &self.wanted.filter, Some(EventNumber(next))).await;
                self.page = read.map_err(|e| {
                    tracing::warn!(error = %e, "an export of events was broken off");
                    io::Error::other(e)
                })?;
            }
        }
        Ok(Some((lines.into(), self)))
    }
}

fn headers(format: Format, reach: &Reach) -> HeaderMap {
    let text = |text: String| HeaderValue::try_from(text).expect("letters, digits and signs");
    let now = Time(clock::now()).to_string();
    // `2026-01-31T12:00:00.000Z`, as a part of a file's name.
    let now: String = now.chars().take(19).filter(|c| !matches!(c, '-' | ':')).collect();
    let name = format!("attachment; filename=\"audit-log-{now}Z.{}\"", format.name());
    let gaps = reach.gaps.iter().filter(|gap| gap.what == "events").count();
    let from = reach.events_from.map(|at| (FROM, text(Time(at).to_string())));
    let all = [
        (header::CONTENT_TYPE, HeaderValue::from_static(format.media_type())),
        (header::CONTENT_DISPOSITION, text(name)),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        // Shown nevertheless, nothing of it runs.
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'; sandbox")),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            HeaderValue::from_static("same-origin"),
        ),
        (GAPS, gaps.into()),
    ];
    all.into_iter().chain(from).collect()
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;

    use super::*;
    use crate::store::{NewRow, StoreError, fake::FakeStore};

    const MOST: usize = 1 << 20;

    fn wanted(query: &str) -> Result<Wanted, Refusal> {
        let pairs = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        Parameters::of(pairs).read()
    }

    async fn with_events(number: usize) -> FakeStore {
        let store = FakeStore::default();
        let event = |n: usize| NewRow {
            number: None,
            at: std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(n as u64),
            event_type: "a".to_owned(),
            message_id: Some(format!("=m{n}")),
            body: format!("{{\"event\":\"a\",\"n\":{n}}}").into(),
            redelivered: false,
            tenant: None,
        };
        store.append((0..number).map(event).collect()).await.expect("appends");
        store
    }

    #[tokio::test]
    async fn a_file_has_all_events_once_newest_first_and_is_read_a_page_at_a_time() {
        const EVENTS: usize = 2 * ROWS + 7;
        let exporter = Exporter::new(with_events(EVENTS).await);
        let jsonl = exporter.file(wanted("format=jsonl").expect("valid")).await.expect("a file");
        let text = to_bytes(jsonl.into_body(), MOST).await.expect("whole");
        let lines: Vec<serde_json::Value> = String::from_utf8_lossy(&text)
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        let numbers: Vec<_> = lines.iter().filter_map(|line| line["number"].as_u64()).collect();
        let expected: Vec<u64> = (1..=EVENTS as u64).rev().collect();
        assert_eq!(numbers, expected);
        assert_eq!(lines[0]["body"], format!("{{\"event\":\"a\",\"n\":{}}}", EVENTS - 1));
        let csv = exporter.file(wanted("format=csv").expect("valid")).await.expect("a file");
        let text = to_bytes(csv.into_body(), MOST).await.expect("whole");
        let text = String::from_utf8_lossy(&text);
        assert_eq!(text.lines().count(), EVENTS + 1);
        assert!(text.starts_with("number,at,event,") && text.contains(",\"'=m7\","), "{text}");
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_completed_is_broken_off_and_no_more_than_some_are_written() {
        let store = with_events(3 * ROWS).await;
        let exporter = Exporter::new(store.clone());
        let file = async || exporter.file(wanted("format=csv").expect("valid")).await;
        let (first, second) = (file().await.expect("a file"), file().await.expect("a file"));
        assert_eq!(file().await.err().map(|e| e.status), Some(StatusCode::TOO_MANY_REQUESTS));
        drop(second);
        let mut body = first.into_body().into_data_stream();
        assert!(body.next().await.is_some_and(|part| part.is_ok()), "the head");
        store.memory().away = Some(StoreError::away("gone"));
        assert!(
            body.any(async |part| part.is_err()).await,
            "its client sees that it is no whole file"
        );
        assert_eq!(file().await.err().map(|e| e.status), Some(StatusCode::SERVICE_UNAVAILABLE));
        for (query, field) in
            [("", "format"), ("format=xml", "format"), ("format=csv&limit=1", "limit")]
        {
            let refusal = wanted(query).err().expect("refused");
            assert_eq!(refusal.fields[0].field, field, "{query}");
        }
    }
}
