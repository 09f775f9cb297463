"""Pictures"""
