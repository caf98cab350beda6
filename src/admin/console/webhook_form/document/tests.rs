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
