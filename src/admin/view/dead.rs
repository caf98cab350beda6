//! Dead letters as the API lists, replays and purges them.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Serialize};

use super::Time;
use crate::{
    delivery::{AttemptLog, AttemptResult, FailedAttempt},
    letters::{Done, Key},
    queue::Held,
};

/// The oldest dead letters of a subscriber that fit.
#[derive(Debug, Serialize, Deserialize)]
pub struct DeadLetters {
    pub subscriber: String,
    /// All that there are, listed or not.
    pub dead: u32,
    /// False if more may fit: the list is full, or the time was over.
    #[serde(default)]
    pub complete: bool,
    pub letters: Vec<DeadLetter>,
}

/// A dead letter, without its body and its attempts.
#[derive(Debug, Serialize, Deserialize)]
pub struct DeadLetter {
    /// Its place in the walk, from 1.
    pub number: usize,
    /// What it is known by, whatever its place is.
    #[serde(default)]
    pub key: String,
    pub subscriber: Option<String>,
    pub id: Option<String>,
    pub kind: String,
    pub reason: String,
    pub status: Option<u16>,
    pub error: String,
    pub events: u32,
    pub attempts: u32,
    pub first_attempt_at: Option<Time>,
    pub died_at: Option<Time>,
    pub content_type: Option<String>,
    pub content_encoding: Option<String>,
    pub bytes: usize,
}

impl DeadLetter {
    pub fn new(number: usize, held: &Held) -> Self {
        let letter = &held.letter;
        Self {
            number,
            key: Key::of(letter).to_string(),
            subscriber: held.subscriber.as_ref().map(ToString::to_string),
            id: letter.id.clone(),
            kind: letter.kind.name().to_owned(),
            reason: letter.reason.name().to_owned(),
            status: letter.status,
            error: letter.error.clone(),
            events: letter.events,
            attempts: letter.attempts,
            first_attempt_at: letter.first_attempt_at.map(Time),
            died_at: letter.died_at.map(Time),
            content_type: letter.content_type.clone(),
            content_encoding: letter.content_encoding.clone(),
            bytes: letter.body.len(),
        }
    }

    /// Without what the receiver has answered, which may be what it was sent: a URL's path.
    pub(in crate::admin) fn without_answer(mut self) -> Self {
        if let Some(status) = self.status {
            self.error = format!("status {status}");
        }
        self
    }
}

/// A dead letter with its failed attempts and its body.
#[derive(Debug, Serialize, Deserialize)]
pub struct WholeLetter {
    #[serde(flatten)]
    pub letter: DeadLetter,
    pub story: Vec<Step>,
    /// Where it is UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_base64: Option<String>,
}

impl WholeLetter {
    pub fn new(number: usize, held: &Held) -> Self {
        let body = std::str::from_utf8(&held.letter.body).ok().map(str::to_owned);
        let body_base64 = body.is_none().then(|| BASE64.encode(&held.letter.body));
        let story = story(&held.letter.attempt_log);
        Self { letter: DeadLetter::new(number, held), story, body, body_base64 }
    }
}

/// A failed attempt; or the number of those that are left out between the first and the last.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Step {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left_out: Option<u32>,
}

fn story(log: &AttemptLog) -> Vec<Step> {
    let one = |a: &FailedAttempt| {
        let (status, failure) = match &a.result {
            AttemptResult::Status(status) => (Some(*status), None),
            AttemptResult::Failure(name) => (None, Some(name.clone())),
        };
        Step { attempt: Some(a.number), at: Some(Time(a.at)), status, failure, left_out: None }
    };
    let (first, left_out, last) = log.parts();
    let gap = (left_out > 0).then(|| Step { left_out: Some(left_out), ..Step::default() });
    first.iter().map(one).chain(gap).chain(last.iter().map(one)).collect()
}

/// The body of a request to replay or to purge dead letters. Without any choice all are meant.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LettersRequest {
    /// Only letters with one of these ids, or of these keys.
    #[serde(default, deserialize_with = "super::present", skip_serializing_if = "Option::is_none")]
    pub ids: Option<Vec<String>>,
    #[serde(default, deserialize_with = "super::present", skip_serializing_if = "Option::is_none")]
    pub keys: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// One status, or a class such as `5xx`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// A pattern: only letters with an event whose type matches it.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub event_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<Time>,
    /// The `as_of` of a count: what died later is not meant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub as_of: Option<Time>,
    /// The most letters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub most: Option<usize>,
    /// Only counts.
    #[serde(default)]
    pub dry_run: bool,
}

/// What was done to dead letters, or would be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LettersDone {
    pub subscriber: String,
    pub dry_run: bool,
    /// Letters that were replayed or purged; or that would be.
    pub letters: usize,
    /// Letters that were chosen and cannot be replayed: they stay.
    pub skipped: usize,
    /// All dead letters, at the begin.
    pub dead: usize,
    /// False if more may fit: the most of one request were met, or the time was over.
    pub complete: bool,
    /// When the latest of them died. A request with it means no letter that died later.
    pub as_of: Option<Time>,
    /// Ids and keys that no letter has, or that were not met.
    pub not_found: Vec<String>,
}

impl LettersDone {
    pub(in crate::admin) fn new(
        (subscriber, dead): (&str, usize),
        done: Done,
        dry_run: bool,
        not_found: Vec<String>,
    ) -> Self {
        let Done { letters, skipped, passed, latest } = done;
        let subscriber = subscriber.to_owned();
        let (complete, as_of) = (passed >= dead, latest.map(Time));
        Self { subscriber, dry_run, letters, skipped, dead, complete, as_of, not_found }
    }
}
