//! The tables of the pages, all of the same make.

use maud::{Markup, html};

/// A column, by its heading.
#[derive(Debug, Clone, Copy)]
pub(super) enum Column {
    Text(&'static str),
    /// Its cells have the class `number` too.
    Number(&'static str),
}

/// A table that scrolls by itself where it is too wide; `name` is what a screen reader calls it.
pub(super) fn table(name: &str, columns: &[Column], rows: Markup) -> Markup {
    html! {
        div.scroll role="region" aria-label=(name) tabindex="0" {
            table {
                thead {
                    tr {
                        @for column in columns {
                            @match column {
                                Column::Text(heading) => th scope="col" { (heading) },
                                Column::Number(heading) => th.number scope="col" { (heading) },
                            }
                        }
                    }
                }
                tbody { (rows) }
            }
        }
    }
}
