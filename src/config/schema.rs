//! The JSON Schema of the configuration.

use serde_json::{Value, json};

use super::{
    keys::{Key, Place, ROOT, Shape},
    settings::DEFAULT,
};
use crate::wording::span;

/// The JSON Schema (draft 7, which editors support) of the configuration and of included files.
///
/// The defaults are those of the shipped file. Any string may contain `${VAR}` instead of its
/// value.
pub fn schema() -> serde_json::Value {
    let shipped = toml::from_str(DEFAULT).unwrap_or_default();
    let mut schema = object(ROOT, &shipped);
    schema["$schema"] = "http://json-schema.org/draft-07/schema#".into();
    schema["title"] = "The configuration of hooktrail".into();
    schema
}

fn object(keys: &[Key], shipped: &Value) -> Value {
    let property = |key: &Key| {
        let mut schema = key.shape.schema(shipped);
        schema["description"] = match key.shape {
            Shape::Duration(Some(most)) => {
                format!("{} At most \"{}\".", key.summary, span(most)).into()
            }
            _ => key.summary.into(),
        };
        // In a subscriber the default of a group's key is the top level's value.
        let pointer = format!("/{}", key.path.replace('.', "/"));
        match shipped.pointer(&pointer) {
            // A key without a value of its own, such as `include`, has no default, though the
            // shipped file shows it.
            Some(default) if !key.required && !matches!(key.place, Place::Read) => {
                schema["default"] = default.clone()
            }
            _ => {}
        }
        (key.name().to_owned(), schema)
    };
    let properties: serde_json::Map<_, _> = keys.iter().map(property).collect();
    let required: Vec<_> = keys.iter().filter(|key| key.required).map(Key::name).collect();
    json!({ "type": "object", "additionalProperties": false, "properties": properties, "required": required })
}

impl Shape {
    fn schema(&self, shipped: &Value) -> Value {
        match self {
            Self::Text => json!({ "type": "string" }),
            Self::Flag => json!({ "type": "boolean" }),
            Self::Whole(least, most) => {
                json!({ "type": "integer", "minimum": least, "maximum": most })
            }
            Self::Number(least, most) => {
                json!({ "type": "number", "minimum": least, "maximum": most })
            }
            Self::Duration(_) | Self::Size => {
                json!({ "type": "string", "pattern": r"^ *[0-9][0-9A-Za-zµ. ]*$|\$\{" })
            }
            Self::Word(words) => {
                json!({ "anyOf": [{ "enum": words }, { "type": "string", "pattern": r"\$\{" }] })
            }
            Self::List(item) => json!({ "type": "array", "items": item.schema(shipped) }),
            Self::Table(keys) => object(keys, shipped),
            Self::Map(value) => {
                json!({ "type": "object", "additionalProperties": value.schema(shipped) })
            }
            Self::Either(shapes) => {
                json!({ "anyOf": shapes.iter().map(|shape| shape.schema(shipped)).collect::<Vec<_>>() })
            }
        }
    }
}
