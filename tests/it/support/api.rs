//! A daemon's admin listener as its users meet it.

use std::sync::Mutex;

use serde_json::{Value, json};

use super::{eventually, free_port};

pub(crate) struct Api {
    pub(crate) port: u16,
    client: reqwest::Client,
    /// Requests and answers, to be held against the documents.
    pub(crate) exchanges: Mutex<Vec<Value>>,
}

/// The answer.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) status: u16,
    pub(crate) content_type: String,
    headers: reqwest::header::HeaderMap,
    pub(crate) text: String,
}

impl Answered {
    /// The value of a header; empty if there is none.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl Api {
    /// On a port of its own, so that commands find the daemon.
    pub(crate) fn new() -> Self {
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        Self { port: free_port(), client, exchanges: Mutex::default() }
    }

    /// The lines of a configuration that make the daemon listen there.
    pub(crate) fn section(&self) -> String {
        format!("\n[admin]\nlisten = \"127.0.0.1:{}\"\n", self.port)
    }

    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answered {
        let mut request = self
            .client
            .request(
                method.parse().expect("a method"),
                format!("http://127.0.0.1:{}{path}", self.port),
            )
            .body(body.to_owned());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.expect("an answer");
        let headers = answer.headers().clone();
        let content_type = headers.get("content-type").and_then(|v| v.to_str().ok());
        let answered = Answered {
            status: answer.status().as_u16(),
            content_type: content_type.unwrap_or_default().to_owned(),
            text: answer.text().await.expect("a body"),
            headers,
        };
        let Answered { status, content_type, text, .. } = &answered;
        let exchange = json!({ "method": method, "path": path, "status": status, "content_type": content_type, "text": text });
        self.exchanges.lock().expect("not poisoned").push(exchange);
        answered
    }

    pub(crate) async fn get(&self, path: &str) -> Answered {
        self.send("GET", path, &[], "").await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Answered {
        self.send("POST", path, &[("content-type", "application/json")], body).await
    }

    /// Publishes events over HTTP, one after the other; each is taken.
    pub(crate) async fn publish(&self, token: &str, events: impl IntoIterator<Item = String>) {
        let bearer = format!("Bearer {token}");
        let headers = [("content-type", "application/json"), ("authorization", bearer.as_str())];
        for event in events {
            let answer = self.send("POST", "/api/v1/events", &headers, &event).await;
            assert_eq!(answer.status, 202, "{answer:?}");
        }
    }

    /// The state of a subscriber.
    pub(crate) async fn subscriber(&self, name: &str) -> Value {
        self.get(&format!("/api/v1/subscribers/{name}")).await.json()
    }

    /// Waits until a subscriber is as `condition` wants it.
    pub(crate) async fn wait(&self, name: &str, what: &str, condition: impl Fn(&Value) -> bool) {
        let mut last = Value::Null;
        eventually(&format!("{name}: {what}"), async || {
            last = self.subscriber(name).await;
            condition(&last)
        })
        .await;
    }

    /// The value of a metric's series, as it is written in the exposition.
    pub(crate) async fn metric(&self, series: &str) -> Option<f64> {
        let text = self.get("/metrics").await.text;
        text.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' ')?.trim().parse().ok())
    }
}
