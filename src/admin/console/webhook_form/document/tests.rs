use super::*;

/// The form as it is shown, and sent back without a change.
fn unchanged(document: Value) -> Document {
    patch(&filled(&document, "1"))
}

#[test]
fn what_a_preset_sets_and_what_the_form_has_no_choice_for_is_left_alone() {
    let patched = unchanged(json!({ "url": "https://a.example/", "preset": "mailtrap" }));
    assert_eq!((patched.get("signatures"), patched.get("format")), (None, None));
    let own = json!([{ "header": "X-Signature", "encoding": "hex" }]);
    let patched = unchanged(json!({ "url": "https://a.example/", "signatures": own }));
    assert_eq!(patched.get("signatures"), None);
    assert_eq!(patched.get("format"), Some(&json!("json")));
}

#[test]
fn values_pace_and_order_come_back_as_they_were_and_can_be_taken_out() {
    let document = json!({
        "url": "https://a.example/", "preset": "elastic",
        "match": { "/actor/type": ["user", "7"], "/a = b": ["x = y"] },
        "redact": ["/actor/email", "/changes/*/from"], "redact_with": "[x]",
        "http": { "rate": { "events": "10000/s" }, "compression": "gzip" }, "order": "strict",
    });
    let patched = unchanged(document.clone());
    // A place with the sign between both cannot be shown: it stays.
    assert_eq!(patched.get("match"), None);
    for key in ["preset", "redact", "redact_with", "http", "order"] {
        assert_eq!(patched.get(key), document.get(key), "{key}");
    }
    let plain =
        json!({ "url": "https://a.example/", "match": { "/actor/type": ["user", true, 7] } });
    let again = unchanged(plain);
    assert_eq!(again.get("match"), Some(&json!({ "/actor/type": ["user", "true", "7"] })));
    assert_eq!(again.get("http"), Some(&json!({ "rate": null, "compression": null })));
    let emptied =
        filled(&document, "1").with("conditions", String::new()).with("redact", String::new());
    let emptied = patch(&emptied.with("order", String::new()));
    for key in ["match", "redact", "order"] {
        assert_eq!(emptied.get(key), Some(&Value::Null), "{key}");
    }
    // A page from before there were these fields.
    let old = Form::default().with("url", "https://a.example/".to_owned());
    assert_eq!((patch(&old).get("order"), patch(&old).get("http")), (None, None));
}

#[test]
fn a_receiver_that_is_chosen_later_brings_its_format_and_signature_and_one_that_stays_changes_nothing()
 {
    let plain = filled(&json!({ "url": "https://a.example/" }), "1");
    let patched = patch(&plain.with("preset", "elastic".to_owned()));
    for key in ["format", "signatures"] {
        assert_eq!(patched.get(key), Some(&Value::Null), "{key}");
    }
    let own = json!({ "url": "https://a.example/", "preset": "datadog", "format": "json",
        "signatures": ["standard-webhooks"], "http": { "compression": "none" } });
    let patched = unchanged(own.clone());
    for key in ["format", "signatures", "preset"] {
        assert_eq!(patched.get(key), own.get(key), "{key}");
    }
    assert_eq!(patched.get("http"), Some(&json!({ "rate": null, "compression": "none" })));
}

#[test]
fn a_new_webhook_has_what_was_typed_and_the_format_of_its_receiver() {
    let typed = |pairs: &[(&str, &str)]| {
        let form = pairs.iter().fold(Form::default(), |form, (k, v)| form.with(k, (*v).to_owned()));
        super::document(&form)
    };
    let made = typed(&[
        ("name", "a"),
        ("format", "json"),
        ("more", "1"),
        ("rate", ""),
        ("conditions", " \r\n"),
    ]);
    assert_eq!(made, typed(&[("name", "a"), ("format", "json")]), "nothing of what was left empty");
    let made = typed(&[
        ("name", "a"),
        ("format", "json"),
        ("more", "1"),
        ("preset", "elastic"),
        ("rate", "events  5/s"),
        ("conditions", "/a = 1\r\n/a = 2\r\n/b = \r\n/c"),
    ]);
    assert_eq!((made.get("format"), made.get("preset")), (None, Some(&json!("elastic"))));
    assert_eq!(made.get("http"), Some(&json!({ "rate": { "events": "5/s" } })));
    assert_eq!(made.get("match"), Some(&json!({ "/a": ["1", "2"], "/b": [""], "/c": [] })));
}

#[test]
fn a_form_that_is_sent_back_as_it_was_shown_changes_nothing() {
    let document = json!({
        "url": "https://a.example/", "format": "jsonl", "events": ["user.*", "order.#"],
        "signatures": ["mailtrap"], "description": "one",
    });
    let patched = unchanged(document.clone());
    for (key, value) in document.as_object().expect("an object") {
        assert_eq!(patched.get(key), Some(value), "{key}");
    }
    // A browser ends lines with both.
    let form = filled(&document, "1").with("events", "user.*\r\norder.#\r\n".to_owned());
    assert_eq!(patch(&form).get("events"), document.get("events"));
    assert_eq!(patch(&form.with("events", String::new())).get("events"), Some(&Value::Null));
}
