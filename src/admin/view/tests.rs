use super::*;
use serde::de::DeserializeOwned;
use serde_json::json;

/// An answer with every field, and one with only those that each answer has.
struct Sample {
    full: Value,
    least: Value,
}

fn sample<A: Serialize + DeserializeOwned>(full: A, least: A) -> Sample {
    let [full, least] = [full, least].map(|answer| json!(answer));
    for value in [&full, &least] {
        let read = A::deserialize(value).expect("what is written is read");
        assert_eq!(json!(read), *value);
    }
    Sample { full, least }
}

fn text() -> String {
    "text".to_owned()
}

fn time() -> Time {
    Time(SystemTime::UNIX_EPOCH + Duration::from_millis(1))
}

fn paused() -> Paused {
    Paused { why: text(), since: time(), by: text() }
}

fn lane() -> Lane {
    Lane {
        paused: Some(paused()),
        circuit: Circuit { state: "open".to_owned(), until: Some(time()) },
        held_until: Some(time()),
        waiting_since: Some(time()),
        queue_error: Some(text()),
        backlog: Some(1),
        in_hand: 1,
        in_retry: Some(1),
        next_retry_at: Some(time()),
        dead: Some(1),
        delivered: 1,
        delivered_per_s: 0.5,
        success_rate: Some(0.5),
        p50_s: Some(0.5),
        p99_s: Some(0.5),
        oldest_event_at: Some(time()),
        oldest_event_age_s: Some(0.5),
        last_delivered_at: Some(time()),
        compression_refused: false,
        last_error: Some(LastError {
            at: time(),
            failure: "status".to_owned(),
            status: Some(503),
            cause: Some(text()),
        }),
    }
}

fn subscriber(lane: Option<Lane>) -> Subscriber {
    let is_full = lane.is_some();
    Subscriber {
        tenant: is_full.then(text),
        subscriber: text(),
        state: State::Starting,
        origin: is_full.then(of_file),
        why: is_full.then(text),
        lane,
    }
}

fn of_file() -> Origin {
    Origin::File { file: text(), line: 1 }
}

fn of_api(stamp: Option<Stamp>) -> Origin {
    Origin::Api { version: text(), created: stamp.clone(), changed: stamp }
}

fn details(lane: Option<Lane>) -> SubscriberDetails {
    let is_full = lane.is_some();
    SubscriberDetails {
        status: subscriber(lane),
        settings: is_full.then(|| json!({})),
        document: is_full.then(|| json!({})),
        shadows: is_full.then(of_file),
    }
}

fn subscriber_change(full: bool) -> SubscriberChange {
    SubscriberChange {
        subscriber: text(),
        version: text(),
        bound: full,
        active_since: full.then(time),
        secret: full.then(|| text().into()),
        overlap_until: full.then(time),
        why: full.then(text),
    }
}

fn subscriber_removal() -> SubscriberRemoval {
    SubscriberRemoval { subscriber: text(), backlog: "kept".to_owned() }
}

fn overview(lane: Option<Lane>) -> Overview {
    let held = HeldRemovals { subscribers: [text()].into(), why: text() };
    Overview {
        next: lane.is_some().then(text),
        version: text(),
        phase: "running".to_owned(),
        config: Configuration { file: text(), problem: Some(text()), held: Some(held) },
        queue: QueueState {
            up: true,
            looked_at: Some(time()),
            error: Some(text()),
            delayed_retries: Some(1),
            orphans: Some(1),
        },
        history: Some(history_health(lane.is_some())),
        subscribers: vec![subscriber(lane)],
        removed: vec![Removed { subscriber: text(), events: 1, retries: 1, dead: 1 }],
    }
}

fn history_health(reaches: bool) -> HistoryHealth {
    HistoryHealth {
        state: "kept".to_owned(),
        why: reaches.then(text),
        warning: reaches.then(text),
        events_from: reaches.then(time),
        deliveries_from: reaches.then(time),
        begins_there: reaches.then(text),
        last_event_at: reaches.then(time),
        bytes: reaches.then_some(1),
    }
}

fn pause_state(paused: Option<Paused>) -> PauseChange {
    PauseChange { subscriber: text(), state: State::Paused, changed: true, paused }
}

fn problem(line: Option<usize>) -> Problem {
    let event = BadEvent { index: 0, line, reason: text() };
    let error = FieldError { field: text(), detail: text() };
    Problem {
        field: Some(text()),
        errors: Some(vec![error]),
        invalid: Some(1),
        events: Some(vec![event]),
        ..bare_problem()
    }
}

fn bare_problem() -> Problem {
    Problem { title: text(), status: 400, detail: text(), ..Problem::default() }
}

fn introduction(proof: Option<String>) -> Introduction {
    Introduction { version: text(), config: text(), pid: 1, proof }
}

fn tested() -> Tested {
    Tested {
        subscriber: text(),
        url: text(),
        headers: [("content-type".to_owned(), text().into())].into_iter().collect(),
        body: text(),
        status: Some(200),
        answer: Some(text()),
        failure: Some("status".to_owned()),
        error: Some(text()),
        duration_ms: 1,
        outcome: "delivered".to_owned(),
        verdict: text(),
    }
}

fn waiting_list() -> WaitingList {
    let batch = WaitingBatch {
        number: 1,
        id: text(),
        events: 1,
        attempts: 1,
        status: Some(503),
        failure: Some(text()),
        first_attempt_at: Some(time()),
        last_attempt_at: Some(time()),
        due_at: Some(time()),
        bytes: 1,
    };
    WaitingList { subscriber: text(), waiting: 1, unseen: 1, batches: vec![batch] }
}

fn retried() -> Retried {
    let done = Hastened { moved: 1, due: 1, missing: vec![text()], unseen: 1 };
    Retried::new("text", done, (State::Paused, Some(paused())), true)
}

fn dead_letter() -> DeadLetter {
    DeadLetter {
        number: 1,
        key: text(),
        subscriber: Some(text()),
        id: Some(text()),
        kind: "batch".to_owned(),
        reason: "exhausted".to_owned(),
        status: Some(503),
        error: text(),
        events: 1,
        attempts: 1,
        first_attempt_at: Some(time()),
        died_at: Some(time()),
        content_type: Some(text()),
        content_encoding: Some(text()),
        bytes: 1,
    }
}

fn dead_letters() -> DeadLetters {
    DeadLetters { subscriber: text(), dead: 1, complete: true, letters: vec![dead_letter()] }
}

fn whole_letter(more: bool) -> WholeLetter {
    let status = more.then_some(503);
    let step = Step {
        attempt: more.then_some(1),
        at: more.then(time),
        status,
        failure: more.then(text),
        left_out: more.then_some(1),
    };
    let body = more.then(text);
    WholeLetter { letter: dead_letter(), story: vec![step], body: body.clone(), body_base64: body }
}

fn letters_done() -> LettersDone {
    let done = crate::letters::Done {
        letters: 1,
        skipped: 1,
        passed: 1,
        latest: Some(SystemTime::UNIX_EPOCH),
    };
    LettersDone::new(("text", 1), done, true, vec![text()])
}

fn changes() -> Changes {
    let change =
        Change { subscriber: text(), change: "changed".to_owned(), keys: vec!["url".to_owned()] };
    Changes { changes: vec![change], settings: vec![text()], needs_restart: vec![text()] }
}

fn preview() -> ReloadPreview {
    ReloadPreview { changes: changes(), waits_for_operator: true }
}

fn reloaded() -> Reloaded {
    Reloaded { changes: changes(), not_bound: [text()].into() }
}

fn history_event(full: bool) -> Event {
    let party = || Party { id: Some(text()), kind: Some(text()), name: Some(text()) };
    Event {
        number: 1,
        at: time(),
        event: text(),
        id: text(),
        message_id: Some(text()),
        timestamp: Some(text()),
        actor: party(),
        resource: party(),
        description: Some(text()),
        bytes: 1,
        tenant: full.then(text),
    }
}

fn reach() -> Reach {
    let (from, until) = (time(), time());
    let gap = Gap { from, until, what: "events".to_owned(), why: text(), missing: Some(1) };
    Reach {
        events_from: Some(time()),
        deliveries_from: Some(time()),
        why: text(),
        last_event_at: Some(time()),
        gaps: vec![gap],
    }
}

fn event_list(more: bool) -> EventList {
    EventList {
        events: vec![history_event(more)],
        next: more.then(text),
        searched_back_to: more.then(time),
        history: reach(),
    }
}

fn whereabouts(full: bool) -> Whereabouts {
    Whereabouts {
        subscriber: text(),
        configured: true,
        state: "delivered".to_owned(),
        delivered_at: full.then(time),
        next_attempt_at: full.then(time),
        batch: full.then(text),
        attempt: full.then_some(1),
        status: full.then_some(503),
        failure: full.then(text),
        reason: full.then(text),
        subscriber_paused: full.then(paused),
        patterns: full.then(|| vec![text()]),
        tenant: full.then(text),
        why: full.then(text),
        batches: vec![text()],
    }
}

fn event_where(full: bool) -> EventWhere {
    EventWhere {
        event: history_event(full),
        body: Some(text()),
        body_base64: full.then(text),
        went: vec![whereabouts(full)],
        history: reach(),
    }
}

fn delivery(full: bool) -> Delivery {
    let attempt = Attempt {
        number: 1,
        at: time(),
        duration_ms: Some(1),
        status: Some(503),
        failure: Some("status".to_owned()),
        excerpt: Some(text()),
        by: text(),
    };
    Delivery {
        id: text(),
        subscriber: text(),
        format: Some("json".to_owned()),
        state: "retrying".to_owned(),
        why: full.then(text),
        delivered_at: Some(time()),
        next_attempt_at: Some(time()),
        reason: Some(text()),
        parent: Some(text()),
        events: 1,
        bytes: 1,
        sha256: Some(text()),
        replay: true,
        begun_at: time(),
        changed_at: time(),
        attempts: vec![attempt],
    }
}

fn delivery_list(more: bool) -> DeliveryList {
    DeliveryList {
        deliveries: vec![delivery(more)],
        next: more.then(text),
        searched_back_to: more.then(time),
        history: reach(),
    }
}

fn replay(full: bool) -> Replay {
    Replay {
        id: text(),
        subscriber: text(),
        state: "failed".to_owned(),
        why: full.then(text),
        by: text(),
        created_at: time(),
        changed_at: time(),
        since: full.then(time),
        until: full.then(time),
        events: full.then(text),
        rate: full.then_some(1),
        rows: 1,
        read: 1,
        matched: 1,
        enqueued: 1,
        unusable: 1,
        batches: 1,
        outcome: ReplayOutcome::ONE_EACH,
        missing: 1,
        start_from: full,
    }
}

fn replay_list(more: bool) -> ReplayList {
    ReplayList { replays: vec![replay(more)], next: more.then(text) }
}

fn replay_preview() -> ReplayPreview {
    ReplayPreview { subscriber: text(), events: 1, complete: true, history: reach() }
}

fn resent() -> Resent {
    Resent { id: text(), subscriber: text(), events: 1, bytes: 1 }
}

fn operations(more: bool) -> OperationList {
    let operation = Operation {
        at: time(),
        by: more.then(text),
        what: "pause".to_owned(),
        subject: more.then(text),
        details: more.then(text),
    };
    OperationList { operations: vec![operation], next: more.then(text) }
}

/// Each answer of the API by its request and status.
fn answers() -> Vec<(&'static str, &'static str, &'static str, Sample)> {
    let accepted = Accepted { accepted: 1, unmatched: 1 };
    let one = || sample(details(Some(lane())), details(None));
    let set = || sample(subscriber_change(true), subscriber_change(false));
    let removed = || sample(subscriber_removal(), subscriber_removal());
    let changed = || sample(pause_state(Some(paused())), pause_state(None));
    vec![
        ("/api/v1/events", "post", "202", sample(accepted, accepted)),
        ("/api/v1/events", "get", "200", sample(event_list(true), event_list(false))),
        ("/api/v1/events/{number}", "get", "200", sample(event_where(true), event_where(false))),
        ("/api/v1/deliveries", "get", "200", sample(delivery_list(true), delivery_list(false))),
        ("/api/v1/deliveries/{id}", "get", "200", sample(delivery(true), delivery(false))),
        ("/api/v1/deliveries/{id}/resend", "post", "202", sample(resent(), resent())),
        ("/api/v1/subscribers/{name}/replay", "post", "202", sample(replay(true), replay(false))),
        (
            "/api/v1/subscribers/{name}/replay",
            "post",
            "200",
            sample(replay_preview(), replay_preview()),
        ),
        ("/api/v1/replays", "get", "200", sample(replay_list(true), replay_list(false))),
        ("/api/v1/replays/{id}", "get", "200", sample(replay(true), replay(false))),
        ("/api/v1/replays/{id}/continue", "post", "200", sample(replay(true), replay(false))),
        ("/api/v1/replays/{id}/cancel", "post", "200", sample(replay(true), replay(false))),
        ("/api/v1/operations", "get", "200", sample(operations(true), operations(false))),
        ("/api/v1/daemon", "get", "200", sample(introduction(Some(text())), introduction(None))),
        ("/api/v1/subscribers", "get", "200", sample(overview(Some(lane())), overview(None))),
        ("/api/v1/subscribers", "post", "201", set()),
        ("/api/v1/subscribers", "post", "202", set()),
        ("/api/v1/subscribers/{name}", "get", "200", one()),
        ("/api/v1/subscribers/{name}", "put", "200", set()),
        ("/api/v1/subscribers/{name}", "put", "202", set()),
        ("/api/v1/subscribers/{name}", "patch", "200", set()),
        ("/api/v1/subscribers/{name}", "patch", "202", set()),
        ("/api/v1/subscribers/{name}", "delete", "200", removed()),
        ("/api/v1/subscribers/{name}", "delete", "202", removed()),
        ("/api/v1/subscribers/{name}/rotate-secret", "post", "200", set()),
        ("/api/v1/subscribers/{name}/rotate-secret", "post", "202", set()),
        ("/api/v1/subscribers/{name}/pause", "post", "200", changed()),
        ("/api/v1/subscribers/{name}/resume", "post", "200", changed()),
        ("/api/v1/subscribers/{name}/test", "post", "200", sample(tested(), tested())),
        ("/api/v1/subscribers/{name}/retry", "get", "200", sample(waiting_list(), waiting_list())),
        ("/api/v1/subscribers/{name}/retry", "post", "200", sample(retried(), retried())),
        ("/api/v1/subscribers/{name}/dead", "get", "200", sample(dead_letters(), dead_letters())),
        (
            "/api/v1/subscribers/{name}/dead/{key}",
            "get",
            "200",
            sample(whole_letter(true), whole_letter(false)),
        ),
        (
            "/api/v1/subscribers/{name}/dead/replay",
            "post",
            "200",
            sample(letters_done(), letters_done()),
        ),
        (
            "/api/v1/subscribers/{name}/dead/purge",
            "post",
            "200",
            sample(letters_done(), letters_done()),
        ),
        ("/api/v1/reload", "get", "200", sample(preview(), preview())),
        ("/api/v1/reload", "post", "200", sample(reloaded(), reloaded())),
    ]
}

fn document() -> Value {
    serde_saphyr::from_str(include_str!("../../../docs/admin.yaml")).expect("YAML")
}

/// A schema with what the schemas have that it consists of; of several alternatives the one that a
/// value has the kind of.
fn whole(document: &Value, schema: &Value, of: &Value) -> Value {
    let schema = resolved(document, schema);
    let kind = |one: &&Value| one["properties"]["from"]["const"] == of["from"];
    if let Some(one) = schema["oneOf"].as_array().and_then(|all| all.iter().find(kind)) {
        return one.clone();
    }
    let mut whole = schema.clone();
    for part in schema["allOf"].as_array().into_iter().flatten() {
        let part = resolved(document, part);
        whole["type"] = part["type"].clone();
        for (name, value) in part["properties"].as_object().into_iter().flatten() {
            whole["properties"][name] = value.clone();
        }
        let mut required = whole["required"].as_array().cloned().unwrap_or_default();
        required.extend(part["required"].as_array().into_iter().flatten().cloned());
        whole["required"] = required.into();
    }
    whole
}

/// A schema of the document, its reference followed.
fn resolved<'d>(document: &'d Value, schema: &'d Value) -> &'d Value {
    match schema["$ref"].as_str() {
        None => schema,
        Some(place) => document
            .pointer(place.trim_start_matches('#'))
            .unwrap_or_else(|| panic!("{place} is not there")),
    }
}

fn names<'v>(names: impl Iterator<Item = &'v str>) -> BTreeSet<&'v str> {
    names.collect()
}

/// Compares a schema with the same part of a full answer, and of a least one where that has it.
fn compare(document: &Value, schema: &Value, full: &Value, least: Option<&Value>, at: &str) {
    let schema = &whole(document, schema, full);
    let kinds = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        kind => kind.as_str().into_iter().collect::<Vec<_>>(),
    };
    match full {
        Value::Object(fields) => {
            assert!(kinds.contains(&"object"), "{at}: {kinds:?}");
            let Some(properties) = schema["properties"].as_object() else { return };
            assert_eq!(
                names(fields.keys().map(String::as_str)),
                names(properties.keys().map(String::as_str)),
                "{at}: the fields of the type, and those of the schema"
            );
            if let Some(least) = least.and_then(Value::as_object) {
                assert_eq!(
                    names(least.keys().map(String::as_str)),
                    names(
                        schema["required"]
                            .as_array()
                            .into_iter()
                            .flatten()
                            .filter_map(Value::as_str)
                    ),
                    "{at}: the fields that are never left out, and those that the schema requires"
                );
            }
            for (name, value) in fields {
                // An object that is left out as a whole is compared as it is when it is there.
                let whole = value.is_object().then_some(value);
                let least = least.and_then(|least| least.get(name)).or(whole);
                compare(document, &properties[name], value, least, &format!("{at}.{name}"));
            }
        }
        Value::Array(values) => {
            assert!(kinds.contains(&"array"), "{at}: {kinds:?}");
            let least = least.and_then(|least| least.get(0));
            compare(document, &schema["items"], &values[0], least, &format!("{at}[]"));
        }
        value => {
            let is = |kind: &&str| match *kind {
                "string" => value.is_string(),
                "integer" => value.is_u64(),
                "number" => value.is_number(),
                "boolean" => value.is_boolean(),
                _ => false,
            };
            let is_it = schema["const"] == *value;
            let in_list = || schema["enum"].as_array().is_some_and(|words| words.contains(value));
            assert!(
                is_it || kinds.iter().any(is) || in_list(),
                "{at}: {value} is none of {schema}"
            );
        }
    }
}

#[test]
fn the_document_of_the_api_and_its_types_have_the_same_fields() {
    let document = document();
    let mut compared = BTreeSet::new();
    for (path, method, status, Sample { full, least }) in answers() {
        let at = format!("{method} {path} {status}");
        let answer = &document["paths"][path][method]["responses"][status];
        let schema = &answer["content"]["application/json"]["schema"];
        assert!(schema.is_object(), "{at} is not in the document");
        compare(&document, schema, &full, Some(&least), &at);
        compared.insert(at);
    }
    for (path, methods) in document["paths"].as_object().expect("paths") {
        for (method, operation) in methods.as_object().expect("methods") {
            let responses = operation["responses"].as_object();
            for (status, response) in responses.into_iter().flatten() {
                let response = resolved(&document, response);
                let schema = &response["content"]["application/json"]["schema"];
                let at = format!("{method} {path} {status}");
                assert!(
                    schema.is_null() || compared.contains(&at),
                    "{at} is in the document, and no type of it is compared"
                );
            }
        }
    }
    let sample = sample(problem(Some(1)), bare_problem());
    let schema = &document["components"]["schemas"]["Problem"];
    compare(&document, schema, &sample.full, Some(&sample.least), "Problem");
    let by = Stamp { at: time(), by: text() };
    let Sample { full, least } = self::sample(of_api(Some(by)), of_api(None));
    compare(&document, &document["components"]["schemas"]["Origin"], &full, Some(&least), "Origin");
    let [full, least] = [Some(1), None].map(|line| json!(problem(line)));
    let schema = &schema["properties"]["events"]["items"];
    compare(&document, schema, &full["events"][0], Some(&least["events"][0]), "an invalid event");
}

#[test]
fn each_refusal_in_the_document_is_a_problem_whose_types_it_explains() {
    let document = document();
    for (path, methods) in document["paths"].as_object().expect("paths") {
        let below_api = path.starts_with("/api/");
        for (method, operation) in methods.as_object().expect("methods") {
            for (status, response) in operation["responses"].as_object().into_iter().flatten() {
                let content = &resolved(&document, response)["content"];
                let is_problem = content["application/problem+json"]["schema"]["$ref"]
                    == "#/components/schemas/Problem";
                let is_refusal = below_api && !status.starts_with('2');
                assert_eq!(is_problem, is_refusal, "{method} {path} {status}");
            }
        }
    }
    let kind = &document["components"]["schemas"]["Problem"]["properties"]["type"];
    let explained = kind["description"].as_str().expect("a description");
    let listed: Vec<&str> =
        kind["enum"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    assert_eq!(listed, ProblemKind::ALL.map(ProblemKind::uri));
    for uri in listed {
        assert!(explained.contains(&format!("`{uri}`")), "{uri} is not explained");
    }
}

#[test]
fn the_words_of_the_document_are_those_of_the_types() {
    let document = document();
    let listed = |place: &str| {
        let words = document.pointer(place).and_then(Value::as_array).expect(place);
        words.iter().filter_map(Value::as_str).map(str::to_owned).collect::<Vec<_>>()
    };
    let states = listed("/components/schemas/SubscriberState/properties/state/enum");
    assert_eq!(states.len(), 9);
    for word in states {
        let state: State = serde_json::from_value(json!(word)).expect("a word");
        assert!(!matches!(state, State::Other(_)) && state.name() == word, "{word}");
        assert_eq!(json!(state), json!(word));
    }
    let circuit =
        listed("/components/schemas/SubscriberState/properties/circuit/properties/state/enum");
    assert_eq!(circuit, CircuitState::ALL.map(CircuitState::name));
    let failures = listed("/components/schemas/Failure/enum");
    assert_eq!(failures, FailureKind::ALL.map(FailureKind::name));
    let deliveries = listed("/components/schemas/Delivery/properties/state/enum");
    let names = crate::store::DeliveryState::NAMES;
    let unknown = crate::store::DeliveryState::UNKNOWN;
    assert_eq!(deliveries, names.into_iter().chain([unknown]).collect::<Vec<_>>());
    let lane_states = [
        status::State::Ok,
        status::State::Waiting { since: SystemTime::UNIX_EPOCH },
        status::State::Retrying,
        status::State::CircuitOpen { until: SystemTime::UNIX_EPOCH },
        status::State::Held { until: SystemTime::UNIX_EPOCH },
        status::State::QueueFails(text()),
    ];
    for state in lane_states {
        assert_eq!(State::from(&state).name(), state.name());
    }
}

#[test]
fn a_daemon_of_another_version_is_understood() {
    let newer: Subscriber = serde_json::from_value(json!({
        "subscriber": "a", "state": "resting", "in_hand": 2, "circuit": { "state": "ajar", "until": null, "why": "x" },
        "last_error": { "at": "2026-01-31T08:00:00.000Z", "failure": "quic", "status": null, "cause": null }, "mood": "calm",
    }))
    .expect("it is read");
    assert_eq!(newer.state, State::Other("resting".to_owned()));
    let lane = newer.lane.expect("its lane");
    assert_eq!((lane.in_hand, lane.circuit.state()), (2, None));
    assert!(lane.last_error.is_some_and(|e| e.failure().is_none() && e.failure == "quic"));
    let older: Overview = serde_json::from_value(json!({
        "phase": "running", "queue": { "up": true },
        "subscribers": [{ "subscriber": "a", "state": "ok", "in_hand": 0, "backlog": 3 }],
    }))
    .expect("it is read");
    assert!(older.removed.is_empty() && older.subscribers[0].lane.is_some());
    let older: Reloaded = serde_json::from_value(json!({ "changes": [] })).expect("it is read");
    assert!(older.not_bound.is_empty() && older.changes.needs_restart.is_empty());
    let older: Problem = serde_json::from_value(json!({ "error": "why" })).expect("it is read");
    assert_eq!((older.detail.as_str(), older.kind), ("why", ProblemKind::Status));
    let newer = json!({ "type": "/problems/moon", "title": "t", "status": 418, "detail": "why" });
    let newer: Problem = serde_json::from_value(newer).expect("it is read");
    assert_eq!((newer.detail.as_str(), newer.kind), ("why", ProblemKind::Status));
    serde_json::from_value::<ReloadPreview>(json!({ "error": "x" }))
        .expect_err("it has no changes");
}
