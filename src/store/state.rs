//! The state of a store, for status and health.

/// The state of a store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreState {
    pub history: HistoryState,
    /// What is wrong besides, with the remedy; history goes on.
    pub warning: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum HistoryState {
    /// It is being opened.
    #[default]
    Opening,
    Open,
    /// It can be read and is not written, for this reason; it goes on by itself.
    Stopped(String),
    /// It can be neither read nor written, for this reason. It is opened again and again.
    Away(String),
    Closed,
    /// None is kept, for this reason: the configuration's.
    Off(String),
}
