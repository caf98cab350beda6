//! The endpoints of receivers: one attempt, an inspection without a request, and one test event.

pub mod inspect;
pub mod test_event;
pub mod webhook;
