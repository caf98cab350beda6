//! Verifies recorded requests with libraries that are not hooktrail's.
//!
//! usage: verify REQUESTS.json; prints a JSON object a line: {"library", "version", "case",
//! "verified"}

use std::collections::HashMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::json;

mod document {
    include!(concat!(env!("OUT_DIR"), "/snippet.rs"));
}

#[derive(serde::Deserialize)]
struct Request {
    case: String,
    headers: HashMap<String, String>,
    body: String,
    secret: String,
}

fn main() {
    let path = std::env::args().nth(1).expect("usage: verify REQUESTS.json");
    let requests: Vec<Request> =
        serde_json::from_slice(&std::fs::read(path).expect("the file")).expect("requests");
    for r in requests.iter().filter(|r| r.headers.contains_key("webhook-signature")) {
        let body = STANDARD.decode(&r.body).expect("base64");
        let header = |(name, value): (&String, &String)| {
            (
                HeaderName::try_from(name).expect("a name"),
                HeaderValue::try_from(value).expect("a value"),
            )
        };
        let headers: HeaderMap = r.headers.iter().map(header).collect();
        let standard = standardwebhooks::Webhook::new(&r.secret)
            .expect("a secret")
            .verify(&body, &headers)
            .is_ok();
        let svix = svix::webhooks::Webhook::new(&r.secret)
            .expect("a secret")
            .verify(&body, &headers)
            .is_ok();
        let document = document::verify(&r.secret, &headers, &body);
        for (library, version, verified) in [
            ("standardwebhooks (crates.io)", "1.0.1", standard),
            ("svix (crates.io)", "1.60.1", svix),
            ("docs/receivers.md: Rust", "", document),
        ] {
            println!(
                "{}",
                json!({ "library": library, "version": version, "case": r.case, "verified": verified })
            );
        }
    }
}
