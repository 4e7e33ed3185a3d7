pub mod config;

